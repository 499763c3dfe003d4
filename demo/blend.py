"""Averages two checkpoints of one line of training: skills of both, where each has lost some.

python demo/blend.py FOLDER OTHER SHARE_OF_OTHER OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoint import load, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("share", type=float, help="of the other's weights, 0 to 1")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    network = load(options.folder)
    theirs = load(options.other).state_dict()
    mixed = {
        name: value.lerp(theirs[name], options.share)
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(mixed)
    save(network, options.out)


if __name__ == "__main__":
    main()
