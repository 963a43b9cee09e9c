"""The command `muntin`: each subcommand is a thin call of the library.

Exit codes: 0 done, 1 a fault of ours, 2 bad input (one line that says what to do), 128 + N stopped by signal N
(a training is saved then, and goes on with --resume).
Only the parser is imported here; what a subcommand needs it imports itself, so that help answers at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from muntin.errors import UserError, nearest

EXTRAS = {
    "detection": "segmentation_models_pytorch faster_coco_eval",
    "train": "jsonargparse lightning PIL sklearn tensorboard timm torchmetrics torchvision yaml numpy",
    "scale": "ray pyarrow pandas datasets webdataset",
    "export": "onnx onnxscript onnxruntime openvino tqdm",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (by default the process's own); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"])
    except SystemExit as stop:  # the parser's: help and wrong arguments
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        code, message = _explain(error)
        if isinstance(error, KeyboardInterrupt) and os.environ.get("RANK", "0") != "0":
            return code  # the first of several processes says it
        print(f"muntin: {' '.join(message.split())}", file=sys.stderr)
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code and what to say."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", 2), str(error) or (
            "stopped; a training run that has saved something continues with: muntin train --out RUN --resume"
        )
    if isinstance(error, ModuleNotFoundError):
        for extra, modules in EXTRAS.items():
            if (error.name or "").partition(".")[0] in modules.split():
                return 2, f'this needs the package {error.name}; install it with: pip install "muntin[{extra}]"'
    if isinstance(error, BrokenPipeError):
        return 1, "the program that was reading the output has ended"
    return 1, f"internal error: {type(error).__name__}: {error} (the traceback: the same command with --debug)"


def _dispatch(arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Without "(default: null)" after every option: the texts say what is worth knowing."""

        def _get_help_string(self, action: Any) -> str:
            return action.help or ""

    class Parser(ArgumentParser):
        """Wrong options are the user's mistake, told in one line."""

        def error(self, message: str, ex: Exception | None = None) -> Any:
            line = " ".join(str(message).split())
            wrong = [word for word in line.split() if word.startswith("--")] if "nrecognized" in line else []
            options = [option for action in self._actions for option in action.option_strings]
            near = nearest(wrong[0].partition("=")[0], [*options, "--debug"]) if wrong else ""
            raise UserError(f"{line}{near}; see {self.prog.replace(' [options]', '')} --help")

    parser = Parser(
        prog="muntin",
        formatter_class=Formatter,
        allow_abbrev=False,
        description="Efficient hierarchical vision transformers: from a folder of images to a trained, measured, "
        "exported model.",
        epilog="example: muntin train --data digits --out runs/digits. Any subcommand takes --debug, which shows "
        "tracebacks.",
    )
    subcommands = parser.add_subcommands(dest="command", required=True, title="subcommands")
    for name, (describe, help_text, example, _) in COMMANDS.items():
        sub = Parser(
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=Formatter,
            allow_abbrev=False,
        )
        describe(sub)
        subcommands.add_subcommand(name, sub, help=help_text)
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        valid = ", ".join(COMMANDS)
        raise UserError(f"there is no subcommand {command!r}{nearest(command, COMMANDS)}; valid are {valid}")
    if "--version" in arguments:
        import muntin

        print(f"muntin {muntin.__version__}")
        return 0
    parsed = parser.parse_args(arguments)
    return COMMANDS[parsed.command][3](parsed[parsed.command])


def _describe_models(parser: Any) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help='a shell pattern, as in "swin_free*"')


def _models(args: Any) -> int:
    import fnmatch
    import json
    from importlib import resources

    table = json.loads((resources.files("muntin") / "models" / "table.json").read_text(encoding="utf-8"))
    rows = [row for row in table if fnmatch.fnmatchcase(row["name"], args.pattern)]
    if not rows:
        names = [row["name"] for row in table]
        raise UserError(f"no model matches {args.pattern!r}{nearest(args.pattern, names)}; see all with: muntin models")
    cells = [["name", "parameters", "GMACs", "size", "top-1", "source"]]
    for row in rows:
        top1 = row["top1"] or "-"
        cells.append(
            [row["name"], f"{row['parameters']:,}", f"{row['gmacs']:.3f}", str(row["size"]), top1, row["source"] or "-"]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        numbers = "  ".join(text.rjust(width) for text, width in zip(line[1:5], widths[1:5], strict=True))
        print(f"{line[0]:<{widths[0]}}  {numbers}  {line[5]}".rstrip())
    return 0


def _describe_weights(parser: Any) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help='models by a shell pattern, as in "swinv2*"')
    parser.add_argument("--fetch", metavar="TAG", help="download this file of one model now, for use without a network")


def _weights(args: Any) -> int:
    import fnmatch

    from muntin.weights.download import find, published

    if args.fetch:
        print(find(args.pattern, args.fetch).fetch())
        return 0
    rows = [c for c in published() if fnmatch.fnmatchcase(c.model, args.pattern)]
    if not rows:
        find(args.pattern)  # its error says what there is, or why there is nothing
    cells = [["model", "tag", "size", "classes", "published", "licence", "address"]]
    for c in rows:
        size, classes = (str(c.size), str(c.classes)) if c.classes else ("-", "-")
        cells.append([c.model, c.tag, size, classes, c.top1 or c.figure or "-", c.licence, c.address])
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:6], widths, strict=True)]
        print("  ".join([*left, line[6]]))
    return 0


def _describe_convert(parser: Any) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint in any known dialect, by path or address")
    parser.add_argument("out", metavar="OUT", help="what is written: .safetensors, or .pth or .pt for torch.save")
    parser.add_argument(
        "--to",
        default="muntin",
        help="the dialect: muntin (default), authors, timm, torchvision, transformers, mm or mmpretrain",
    )


def _convert(args: Any) -> int:
    from muntin.weights import convert_file

    what, report = convert_file(args.source, args.out, args.to)
    print(f"{args.out}: {what}, by {args.to}")
    print(report)
    return 0


def _describe_shard(parser: Any) -> None:
    parser.add_argument("data", metavar="FOLDER", help="images: a folder, or anything else that --data takes")
    parser.add_argument("out", metavar="OUT", help="a new folder: PART-000000.tar ..., classes.json, index.json")
    parser.add_argument("--per-shard", type=int, metavar="N", help="images of a shard")
    parser.add_argument(
        "--megabytes", type=float, metavar="M", help="size of a shard, where N is not given (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images' order (default: 0)")
    parser.add_argument("--on-bad-image", default="error", help="error (default), or skip: leave it out, and list it")


def _shard(args: Any) -> int:
    from muntin.data.pack import MEGABYTES, write_shards

    counts = write_shards(
        args.data, args.out, args.per_shard, args.megabytes or MEGABYTES, args.seed, args.on_bad_image
    )
    for part, (images, shards) in counts.items():
        print(f"{args.out}: {part}: {_count(images, 'image')} in {_count(shards, 'shard')}")
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _describe_data(parser: Any) -> None:
    parser.add_argument("action", metavar="check", help="list all that is wrong with images and annotations")
    parser.add_argument("data", metavar="PATH", help="scenes, a COCO or Pascal VOC folder, a .json file, index masks")
    parser.add_argument("--task", help="detect, instance or segment (default: each that the data are for)")
    parser.add_argument("--out", metavar="FOLDER", help="write sheets of samples and a table of the problems there")


def _data(args: Any) -> int:
    from pathlib import Path

    from muntin.data.survey import surveys

    if args.action != "check":
        raise UserError(f"muntin data {args.action}: there is no such action; valid is check")
    found = surveys(args.data, args.task)
    for survey in found:
        print(survey)
        for path in survey.write(Path(args.out)) if args.out else ():
            print(f"  written: {path}")
    return 2 if any(survey.problems for survey in found) else 0


def _describe_train(parser: Any) -> None:
    parser.add_argument("--model", help="name of a model (see: muntin models); swin_free_digits for digits")
    parser.add_argument("--data", help="digits (default), FOLDER/CLASS/*, FOLDER/{train,val}/CLASS/*, or shards ...")
    parser.add_argument(
        "--task", help="classify (default), detect, instance or segment: --data is COCO JSON, VOC, masks"
    )
    parser.add_argument("--head", help="of a task but classify: retinanet, mask_rcnn, upernet ... (docs/detection.md)")
    parser.add_argument("--out", help="the run's folder (default: runs/DATA-MODEL)")
    parser.add_argument("--epochs", help="passes over the training images")
    parser.add_argument("--size", help="side of the model's input in pixels")
    parser.add_argument("--seed", help="of the split, the weights, the order and the augmentation (default: 0)")
    parser.add_argument("--resume", action="store_true", help="continue a stopped run where it was, to the bit")
    parser.add_argument("--force", action="store_true", help="resume with settings other than it had, where possible")
    parser.add_argument("--recipe", help='settings that come with Muntin, as in in1k/swin_t; "list" shows all')
    parser.add_argument("--config", help="a YAML file of settings, such as another run's config.yaml")
    parser.add_argument("--deterministic", action="store_true", help="only algorithms that repeat to the bit")
    parser.add_argument("--print-config", action="store_true", help="print every setting as YAML and train nothing")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting, or model.FIELD: --set lr=1e-3 --set model.window=[4,8,4,2]; may be repeated",
    )


def _train(args: Any) -> int:
    from muntin.tasks.settings import parse_sets

    direct = {
        name: args[name]
        for name in ("model", "data", "task", "head", "epochs", "size", "seed")
        if args[name] is not None
    }
    settings = parse_sets(args.set) | direct | ({"deterministic": True} if args.deterministic else {})
    if args.recipe == "list":
        from muntin.tasks.recipes import describe_recipes

        print(describe_recipes())
        return 0
    if args.print_config:
        from muntin.tasks.recipes import to_yaml
        from muntin.tasks.training import resolved

        print(to_yaml(resolved(args.recipe, args.config, **settings)), end="")
        return 0

    from muntin.tasks.asked import ask

    asked = ask(args.out, args.recipe, args.config, settings)
    if (code := _in_processes(asked, args.resume)) is not None:
        return code

    from muntin.tasks import train

    train(args.out, resume=args.resume, force=args.force, recipe=args.recipe, config=args.config, **settings)
    return 0


def _in_processes(asked: Any, resume: bool) -> int | None:
    """The exit code of this command in as many processes as were asked for; None where this one is to do it."""
    from muntin.tasks.asked import processes
    from muntin.tasks.launch import launch

    devices, nodes, rendezvous = processes(asked, resume)
    if "WORLD_SIZE" in os.environ or devices * nodes == 1:
        return None
    return launch(sys.argv[1:], devices, nodes, rendezvous)


def _describe_sweep(parser: Any) -> None:
    parser.add_argument("sweep", help='a sweep that comes with Muntin, a YAML file with runs, or "list"')
    parser.add_argument("--out", help="the folder of all runs (default: runs/NAME); called again, it goes on")
    parser.add_argument(
        "--seeds", type=str, default="0", help="as in 0,1,2: each row is trained from each (default: 0)"
    )
    parser.add_argument("--data", help="as in muntin train")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all rows")


def _sweep(args: Any) -> int:
    from muntin.tasks.asked import ask
    from muntin.tasks.settings import parse_sets
    from muntin.tasks.sweep import parse_seeds, read_sweep, sweep, sweeps, table

    if args.sweep == "list":
        print("\n".join(sweeps()))
        return 0
    settings = parse_sets(args.set) | ({"data": args.data} if args.data else {})
    seeds, plan = parse_seeds(args.seeds), read_sweep(args.sweep)
    if (code := _in_processes(ask(None, plan.recipe, None, plan.settings | settings), resume=False)) is not None:
        return code
    rows = sweep(args.sweep, args.out, seeds=seeds, **settings)
    if os.environ.get("RANK", "0") == "0":
        print(table(rows))
    return 0


def _describe_views(parser: Any) -> None:
    """Options of detection and segmentation, where several views of an image make one result."""
    parser.add_argument("--scales", help="of detection and segmentation: sizes to look at, as in 0.75,1,1.25")
    parser.add_argument("--flip", action="store_true", help="of detection and segmentation: the mirror image too")
    parser.add_argument("--crop", type=int, help="of segmentation: side of a window that slides over the image")


def _views(args: Any) -> dict[str, Any]:
    """Those that were given."""
    views: dict[str, Any] = {name: args[name] for name in ("flip", "crop") if args[name]}
    if args.scales:
        try:
            views["scales"] = tuple(float(part) for part in args.scales.split(","))
        except ValueError as error:
            raise UserError(f"--scales {args.scales}: give numbers with commas between, as in 0.75,1,1.25") from error
    return views


def _describe_eval(parser: Any) -> None:
    parser.add_argument("run", help="a run's folder or weights, an exported file, or a checkpoint with --model")
    parser.add_argument("--data", help="digits, or a folder (default: the run's own test split)")
    parser.add_argument("--split", help="train, val or test, where the data has them")
    parser.add_argument("--model", help="name of the model that a foreign checkpoint holds")
    parser.add_argument("--size", type=int, help="side of the input for a foreign checkpoint (default: 224)")
    parser.add_argument("--json", help="write everything to this file too")
    _describe_views(parser)


def _eval(args: Any) -> int:
    from pathlib import Path

    from muntin.run import Run, write_json
    from muntin.runtime.targets import TARGETS
    from muntin.tasks import evaluate

    run = args.run if args.model or Path(args.run).suffix in TARGETS else Run.open(args.run)
    views = _views(args)
    found = evaluate(run, args.data, split=args.split, model=args.model, size=args.size, **views)
    print(found)
    if isinstance(run, Run) and args.data is None and found.split == "test" and not views:
        write_json(run.path / "evaluation.json", found.json())
    if args.json:
        write_json(args.json, found.json())
    return 0


def _describe_predict(parser: Any) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors, or an exported file")
    parser.add_argument("images", nargs="+", help="files, folders, .txt lists with one path per line; see --engine")
    parser.add_argument(
        "--out", help="a table, .csv; with --engine a folder of Parquet files; of a detector or segmenter a folder"
    )
    parser.add_argument("--top", type=int, help="classes per image (default: 5; of a multi-label run, no limit)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="of a multi-label run: every class from this probability on (default: 0.5); of a detector: least score",
    )
    parser.add_argument(
        "--engine",
        help="ray: many processes, here or on a cluster; takes .tar shards too and continues where it stopped",
    )
    parser.add_argument("--workers", type=int, help="processes of --engine ray (default: one per GPU, or per core)")
    parser.add_argument("--overwrite", action="store_true", help="with --engine ray: remove what OUT holds first")
    _describe_views(parser)


def _predict(args: Any) -> int:
    if args.engine is not None:
        return _predict_batches(args)
    for option in ("workers", "overwrite"):
        if args[option]:
            raise UserError(f"--{option} is for --engine ray; add that, or leave it out")

    from muntin.tasks.trained import open_any, refuse_views
    from muntin.tasks.trained_dense import TrainedDense

    views, trained = _views(args), open_any(args.run)
    if isinstance(trained, TrainedDense):
        from muntin.tasks import predict_dense

        if args.top is not None:
            raise UserError(f"--top {args.top} is for classifiers; choose what {args.run} finds with --threshold")
        out = args.out or trained.folder / "predictions"
        print(predict_dense(trained, args.images, out, threshold=args.threshold, **views))
        return 0
    refuse_views(args.run, views)

    from muntin.tasks import predict
    from muntin.tasks.inference import write_predictions

    rows = predict(trained, args.images, top=args.top, threshold=args.threshold)
    for row in rows:
        if row.error:
            print(f"muntin: {row.error}", file=sys.stderr)
        elif not args.out:
            ranked = zip(row.classes, row.probabilities, strict=True)
            print(row.image, *(f"{name} {probability:.1%}" for name, probability in ranked), sep="  ")
    broken = sum(bool(row.error) for row in rows)
    if broken == len(rows):
        raise UserError(f"none of the {broken} images could be read; give images such as PNG or JPEG files")
    if args.out:
        write_predictions(rows, args.out)
        print(f"{args.out}: {len(rows)} images" + (f", {broken} of them unreadable" if broken else ""))
    return 0


def _predict_batches(args: Any) -> int:
    if args.engine != "ray":
        near = nearest(args.engine, ["ray"])
        raise UserError(f"there is no engine {args.engine!r}{near}; valid is ray, or leave --engine out")
    if args.out is None or args.out.endswith(".csv"):
        raise UserError(f"--out {args.out or 'is missing'}: with --engine ray give a folder for Parquet files")

    from muntin.tasks.batch import predict_batches

    report = predict_batches(
        args.run,
        args.images,
        args.out,
        top=args.top,
        threshold=args.threshold,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    print(report)
    if report.failed:
        raise UserError(f"{report.not_done()}; their images are missing, and the same command tries again")
    if report.images and report.unreadable == report.images:
        raise UserError(f"none of the {report.images} images could be read; give images such as PNG or JPEG files")
    return 0


def _describe_export(parser: Any) -> None:
    parser.add_argument("source", help="a run's folder or model.safetensors; with weights also MODEL or HEAD:MODEL")
    parser.add_argument(
        "--to",
        nargs="+",
        help="onnx (default), openvino, pt2, tensorrt, coreml, executorch; several with commas or spaces between",
    )
    parser.add_argument("--out", help="the file, or a folder (default: RUN/model.SUFFIX, or NAME.SUFFIX here)")
    parser.add_argument("--precision", default="float32", help="inside: float32 (default), float16 or bfloat16")
    parser.add_argument(
        "--fixed", type=str, metavar="BxHxW", help="for this batch, height and width alone, as in 1x224x224"
    )
    parser.add_argument("--with-preprocessing", action="store_true", help="the file takes bytes and normalises them")
    parser.add_argument("--backbone", action="store_true", help="the maps of its stages instead of logits")
    parser.add_argument("--out-indices", type=str, metavar="I,J", help="which stages' maps, as in 1,2,3 (default: all)")
    parser.add_argument("--weights", metavar="FILE|TAG", help="of a named model: a checkpoint, or a published tag")
    parser.add_argument("--pretrained", action="store_true", help="the first published weights of a named model")
    parser.add_argument("--random-weights", action="store_true", help="none: for the graph's sake")
    parser.add_argument(
        "--size", type=str, help="side of the input in pixels, or HxW (default: the run's or the weights' own)"
    )
    parser.add_argument("--opset", type=int, help="of ONNX (default: 20)")
    parser.add_argument("--json", help="write the reports to this file too")


def _export(args: Any) -> int:
    from muntin.measure.machine import versions
    from muntin.run import write_json
    from muntin.runtime import several, sources

    names = [name for words in args.to or () for name in words.split(",") if name]
    several.suffixes(names)
    fixed: Any = several.parse_sides(args.fixed, "--fixed", 3) if args.fixed else None
    size = several.parse_size(args.size) if args.size else (fixed[1:] if fixed else None)
    weights = sources.Weights(args.weights or args.pretrained, args.random_weights)
    indices = several.parse_indices(args.out_indices) if args.out_indices else None
    source = sources.open_source(args.source, weights, size, args.backbone, indices)
    outcomes = several.export_several(
        source,
        several.places(source, names, args.out),
        precision=args.precision,
        fixed=fixed,
        with_preprocessing=args.with_preprocessing,
        opset=args.opset,
    )
    print(several.table(outcomes) if len(outcomes) > 1 or not outcomes[0].report else outcomes[0].report)
    if args.json:
        write_json(args.json, {"exports": [outcome.json() for outcome in outcomes], "versions": versions()})
    return several.exit_code(outcomes)


def _describe_bench(parser: Any) -> None:
    add = parser.add_argument
    add("targets", nargs="*", help="model names, HEAD:MODEL, run folders, timm:, torchvision: or hf:NAME, files")
    add("--engine", nargs="+", type=str, help="eager (default), optimize, compile, onnx, openvino, pt2")
    add("--precision", nargs="+", type=str, help="fp32, bf16 or fp16, or several (default: fp32)")
    add("--batch", nargs="+", type=str, help="batch sizes, as in 1,8 (default: 1,8; on a GPU 1,64)")
    add("--size", nargs="+", type=str, help="sides in pixels, as in 224,384 or 224:1024 (default: each target's own)")
    add("--threads", type=int, help="of the CPU (default: all)")
    add("--base", help="the row or model that speeds are against (default: the first)")
    add("--dtype", help="another name of --precision")
    add("--device", help="cpu or cuda (default: the GPU where there is one)")
    add("--rounds", type=int, default=10, help="turns per row, interleaved (default: 10)")
    add("--seconds", type=float, default=3.0, help="timed per row (default: 3)")
    add("--optimize", action="store_true", help="also the optimised copy of each of our models")
    add("--no-memory", action="store_true", help="leave out the peak memory, which takes a process for each row")
    add("--cuda-graphs", action="store_true", help="on a GPU: replay each call as a CUDA graph")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="measure nothing: two stored results side by side")
    add("--json", help="write the results with machine, versions and protocol to this file")
    add("--plot", help="draw time and memory against pixels: .png or .html")
    add("--pareto", help="draw published accuracy over the latency measured: .png or .html")


def _bench(args: Any) -> int:
    from muntin.measure.command import bench_command

    print(bench_command(args))
    return 0


def _describe_pareto(parser: Any) -> None:
    parser.add_argument("results", nargs="+", help="files that muntin bench --json wrote")
    parser.add_argument("--out", nargs="+", default=["pareto.html"], help="what is drawn: .html, .png or both")


def _pareto(args: Any) -> int:
    from muntin.measure.pareto import check_out, pareto, write_pareto

    outs = [check_out(out) for out in args.out]
    found = pareto(*args.results)
    print(found)
    for out in outs:
        write_pareto(found, out)
    return 0


def _describe_choose(parser: Any) -> None:
    add = parser.add_argument
    add("--latency", help="the budget for one call: 20ms, 900us or 0.5s")
    add("--throughput", type=float, help="the budget in images a second, instead of --latency")
    add("--engine", default="eager", help="eager, optimize, compile, onnx, openvino or pt2 (default: eager)")
    add("--precision", default="fp32", help="fp32, bf16 or fp16 (default: fp32)")
    add("--batch", type=int, default=1, help="images in a call (default: 1)")
    add("--size", help="side in pixels, or HEIGHTxWIDTH (default: each model's own, which its accuracy holds for)")
    add("--threads", type=int, help="of the CPU (default: all)")
    add("--among", nargs="+", default=["*"], help='patterns of names, as in "swin*" "rmt*", or timm:NAME')
    add("--device", help="cpu or cuda (default: the GPU where there is one)")
    add("--seconds", type=float, default=2.0, help="timed for each model near the budget (default: 2)")
    add("--json", help="write what was found, with machine and versions, to this file")


def _choose(args: Any) -> int:
    from muntin.measure.choose import choose
    from muntin.measure.cost import parse_size
    from muntin.run import atomic_write

    choice = choose(
        args.latency,
        args.throughput,
        engine=args.engine,
        precision=args.precision,
        batch=args.batch,
        size=args.size and parse_size(args.size),
        threads=args.threads,
        among=args.among,
        device=args.device,
        seconds=args.seconds,
    )
    print(choice)
    if args.json:
        atomic_write(args.json, choice.json().encode())
    if choice.chosen is None:
        raise UserError(choice.refusal())
    return 0


def _describe_cost(parser: Any) -> None:
    parser.add_argument("targets", nargs="+", help="model names, run folders, HEAD:MODEL, timm:NAME, torchvision:NAME")
    parser.add_argument("--size", help="side in pixels, or HEIGHTxWIDTH (default: each model's own)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--nodes", action="store_true", help="also nodes of norms and activations in exported graphs")
    parser.add_argument("--json", help="write everything to this file too")


def _cost(args: Any) -> int:
    from muntin.measure.cost import costs, costs_json, costs_text, parse_size
    from muntin.run import write_json

    found = costs(args.targets, args.size and parse_size(args.size), args.batch)
    print(costs_text(found))
    counted: dict[str, Any] = {"models": costs_json(found)}
    if args.nodes:
        from muntin.measure.nodes import nodes

        report = nodes(args.targets, args.size and parse_size(args.size))
        print(f"\n{report}")
        counted["nodes"] = report.json()
    if args.json:
        write_json(args.json, counted)
    return 0


def _describe_profile(parser: Any) -> None:
    parser.add_argument("targets", nargs="+", help="model names, run folders, timm:NAME, torchvision:NAME, hf:NAME")
    parser.add_argument("--engine", nargs="+", default=["eager"], help="eager (default), optimize, compile, onnx")
    parser.add_argument("--batch", nargs="+", default=["1"], help="batch sizes (default: 1)")
    parser.add_argument("--size", help="side in pixels, or HEIGHTxWIDTH (default: each model's own)")
    parser.add_argument("--precision", default="float32", help="fp32 (default), bf16 or fp16")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all)")
    parser.add_argument("--device", help="cpu (default) or cuda")
    parser.add_argument("--calls", type=int, default=5, help="profiled passes, whose medians are shown (default: 5)")
    parser.add_argument("--json", help="write everything to this file too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the kinds of all models side by side")
    parser.add_argument("--html", help="write one page with all tables and pictures")
    parser.add_argument("--trace", help="write a trace for Perfetto or Chrome")


def _profile(args: Any) -> int:
    from muntin.measure.cost import parse_size
    from muntin.measure.profile_text import beside
    from muntin.measure.profiles import check_files, numbers, profiles, words, write

    files = {"to_json": args.json, "plot": args.plot, "html": args.html, "trace": args.trace}
    check_files(**files)
    found = profiles(
        args.targets,
        words(args.engine),
        numbers(args.batch, "--batch"),
        args.size and parse_size(args.size),
        precision=args.precision,
        threads=args.threads,
        device=args.device,
        calls=args.calls,
    )
    print("\n\n".join(one.table() for one in found))
    if len(found) > 1:
        print(f"\n{beside(found)}")
    for path in write(found, **files):
        print(f"written: {path}")
    return 0


def _describe_report(parser: Any) -> None:
    parser.add_argument("run", help="a run's folder")


def _report(args: Any) -> int:
    from muntin.measure import report, summary
    from muntin.run import Run

    run = Run.open(args.run)
    report(run)
    print(summary(run))
    return 0


COMMANDS: dict[str, tuple[Any, str, str, Any]] = {
    "models": (_describe_models, "list the models", 'muntin models "swin_free*"', _models),
    "weights": (_describe_weights, "list published weights", 'muntin weights "swinv2*"', _weights),
    "convert": (
        _describe_convert,
        "write a checkpoint under other names",
        "muntin convert swin_tiny_patch4_window7_224.pth swin_t.safetensors",
        _convert,
    ),
    "shard": (_describe_shard, "write images as tar shards", "muntin shard photos shards --megabytes 256", _shard),
    "data": (
        _describe_data,
        "look for mistakes in annotated images before training on them",
        "muntin data check coco --task instance --out checked",
        _data,
    ),
    "train": (
        _describe_train,
        "train a classifier, detector or segmenter",
        "muntin train --data photos --model swin_free_t --epochs 50 --out runs/photos. Exit code 143 (SIGTERM), 138 "
        "(SIGUSR1) or 130 (Ctrl-C): saved and stopped, to be called again with --resume; 2: bad input.",
        _train,
    ),
    "sweep": (
        _describe_sweep,
        "train every row of a grid of settings",
        "muntin sweep digits_windows --seeds 0,1,2 --out runs/windows",
        _sweep,
    ),
    "eval": (_describe_eval, "evaluate a run or a checkpoint", "muntin eval runs/photos --data holiday", _eval),
    "predict": (
        _describe_predict,
        "classify images, or find and segment what is on them",
        "muntin predict runs/photos cat.jpg holiday --out predictions.csv",
        _predict,
    ),
    "export": (
        _describe_export,
        "export a model, verified in the target's runtime",
        "muntin export runs/photos --to onnx,openvino",
        _export,
    ),
    "bench": (
        _describe_bench,
        "measure latency, throughput and memory",
        "muntin bench swin_t timm:swin_tiny_patch4_window7_224 --engine eager,onnx --batch 1,8",
        _bench,
    ),
    "choose": (
        _describe_choose,
        "find the most accurate model that meets a budget on this machine",
        "muntin choose --latency 20ms --engine openvino",
        _choose,
    ),
    "pareto": (
        _describe_pareto,
        "draw published accuracy over measured latency",
        "muntin pareto bench.json --out pareto.html pareto.png",
        _pareto,
    ),
    "cost": (
        _describe_cost,
        "count parameters, operations and memory",
        "muntin cost swin_t swin_free_t timm:resnet50",
        _cost,
    ),
    "profile": (
        _describe_profile,
        "show where the time of a forward pass goes",
        "muntin profile swin_b timm:swin_base_patch4_window7_224 --engine eager,onnx --html profile.html",
        _profile,
    ),
    "report": (_describe_report, "make one HTML page about a run", "muntin report runs/photos", _report),
}
