"""Run the three-seed recipe on the demo's teacher and articles: about half an hour on two cores.

    python pipelines/smollm2_wiki/run.py [--out runs/smollm2_wiki] [--articles 600]

Needs `make models`. Stopped, the same command goes on. Ends in the table of docs and README, and `results.json`.
"""

import argparse
import json
from pathlib import Path

from kdcache import display
from kdcache.demo import run_recipe, write_articles


def main() -> None:
    """Write the articles, run the recipe, show the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2_wiki"))
    parser.add_argument("--articles", type=int, default=600, help="articles to train on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="laid over the recipe")
    arguments = parser.parse_args()
    data = write_articles(arguments.out / "data", arguments.articles, 80)
    recipe = Path(__file__).with_name("recipe.yaml")
    result = run_recipe(recipe, arguments.out, data, overrides=arguments.set)
    display.comparison(result)
    print(json.dumps(result["rows"]))


if __name__ == "__main__":
    main()
