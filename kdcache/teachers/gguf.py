"""Convert a GGUF file to a transformers folder, once; loading the folder is then forty times faster."""

import os
import shutil
import tempfile
from pathlib import Path

from kdcache.errors import AccessError, ConfigError
from kdcache.fingerprint import digest_file


def home() -> Path:
    """Return the folder of converted models: KDCACHE_HOME, or kdcache below the user's cache folder."""
    if own := os.environ.get("KDCACHE_HOME"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdcache"


def find_gguf(model: str, name: str | None) -> Path | None:
    """Return the GGUF file that a model path means; None if it means something else.

    Raises:
        ConfigError: The folder holds several, and none is named.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or ((path / "config.json").is_file() and name is None):
        return None
    if name is not None:
        return path / name
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ConfigError(
            f"The folder holds {len(found)} GGUF files.",
            where=model,
            hint=f"Set teacher.gguf_file to one of {[file.name for file in found]}.",
        )
    return found[0] if found else None


def convert(file: Path) -> Path:
    """Return a transformers folder with the file's weights in bfloat16 and its tokenizer; made if need be.

    The folder's name carries the file's digest. It appears as a whole or not at all.

    Raises:
        AccessError: The file is missing or is not a model that transformers can read.
    """
    target = home() / "models" / f"{file.stem.lower()}-{digest_file(file)[:12]}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        # a model loaded from GGUF refuses to be saved: its weights go into a fresh one of the same configuration
        left_out = ("quantization_config", "_name_or_path", "_model_name_or_path")
        kept = {key: value for key, value in loaded.config.to_dict().items() if key not in left_out}
        fresh = AutoModelForCausalLM.from_config(type(loaded.config)(**kept)).eval()
        fresh.load_state_dict(loaded.state_dict())
        fresh.tie_weights()
        fresh.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.replace(target)
    except OSError as error:
        if (target / "config.json").is_file():  # another process was faster
            return target
        raise AccessError(f"The GGUF file cannot be converted: {error}.", where=str(file)) from error
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise AccessError(
            f"The GGUF file cannot be converted: {str(error).splitlines()[0]}",
            where=str(file),
            hint="It needs the packages gguf and accelerate, and an architecture that transformers reads.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
