"""Train on a folder of images, evaluate on its test split, classify a folder of photographs.

    python examples/train_on_a_folder.py FOLDER RUN

FOLDER holds one sub-folder of images for each class. `--quick` makes a toy of it, to see it run.
"""

import argparse
from typing import Any

from muntin.tasks import evaluate, predict, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("out", metavar="run")
parser.add_argument("--quick", action="store_true")
args = parser.parse_args()
settings: dict[str, Any] = {"model": "swin_free_t", "epochs": 50, "lr": 5e-4}
if args.quick:
    settings = {"model": "swin_free_digits", "epochs": 1, "size": 32, "batch_size": 8, "drop_path": 0.1}

run = train(args.out, data=args.folder, **settings)
print(evaluate(run))
for row in predict(run, [args.folder], top=1)[:5]:
    print(row.image, row.classes[0], f"{row.probabilities[0]:.1%}")
