"""Put the tables and pictures that the experiments left into this folder's README.

python -m ops.experiments.collect RUNS          # RUNS/<experiment>/table.md, as the commands in the README leave them
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
PICTURES = HERE.parent / "pictures"
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURE = re.compile(r"\.\./pictures/experiment-([a-z-]+?)--([a-z_-]+)\.png")


def main() -> None:
    """Copy what is there; say what is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs
    readme = HERE / "README.md"

    def table(match: re.Match[str]) -> str:
        path = runs / match[2] / "table.md"
        if not path.is_file():
            sys.stderr.write(f"{path} is not there: the table of {match[2]} stays as it was\n")
            return match[0]
        return f"{match[1]}\n{path.read_text().strip()}\n\n{match[3]}"

    readme.write_text(text := BLOCK.sub(table, readme.read_text()))
    for experiment, name in sorted(set(PICTURE.findall(text))):
        source = runs / experiment / f"{name}.png"
        if source.is_file():
            shutil.copy(source, PICTURES / f"experiment-{experiment}--{name}.png")
        else:
            sys.stderr.write(f"{source} is not there\n")


if __name__ == "__main__":
    main()
