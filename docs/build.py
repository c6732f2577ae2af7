"""Build the offline site: `python docs/build.py` -> `_site/`. Warnings, broken links among them, are errors."""
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from nbdev.serve import proc_nbs
    from sphinx.cmd.build import main

    proc_nbs(force=True)
    status = main(["-W", "--keep-going", "-q", "-b", "html", "-c", "docs", "-d", "_proc/doctrees", "_proc", "_proc/html"])
    if status:                       # the last good site stays
        sys.exit(status)
    shutil.rmtree("_site", ignore_errors=True)
    shutil.move("_proc/html", "_site")
