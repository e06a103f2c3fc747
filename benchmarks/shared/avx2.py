"""Run a command as on a processor with AVX2 but without AVX-512 and VNNI.

Many hosts have such a processor. ONNX Runtime uses other kernels there, with which int8 gains less. This script
compiles a small library (`hide_avx512.c`, with cc) and preloads the library into the command and its child processes
by LD_PRELOAD. There, the library answers the instruction CPUID, by which programs ask for the features of the
processor. This needs Linux on x86-64 and a processor on which CPUID can be made to fault (`cpuid_fault` among the flags
in /proc/cpuinfo). The figures show the kernels for AVX2, but not the speed of an older processor. The exit code is that
of the command; 1 if the library does not compile or the command is not found; 70 if CPUID cannot be made to fault.

    python -m benchmarks.shared.avx2 python -m benchmarks.models.variants …
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("hide_avx512.c")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "hide_avx512.so"
        compiler = shutil.which("cc")
        command = [compiler or "", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        if compiler is None or subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{SOURCE.name} does not compile here; it needs cc, and Linux on x86-64")
        loaded = {"LD_PRELOAD": ":".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))}
        raise SystemExit(subprocess.run(sys.argv[1:], check=False, env={**os.environ, **loaded}).returncode)


if __name__ == "__main__":
    main()
