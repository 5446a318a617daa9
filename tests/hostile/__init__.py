"""Stores that a stranger might send: `corpus.py` builds them, `test_hostile.py` opens them."""
