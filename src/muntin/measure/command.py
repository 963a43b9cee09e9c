"""`muntin bench`: options as text become one measurement, or a comparison of two stored ones."""

import re
from collections.abc import Sequence
from typing import Any

from muntin.errors import UserError


def words(values: Sequence[str] | None) -> list[str]:
    """Values of an option, separated by commas, spaces or both."""
    return [word for value in values or () for word in re.split(r"[,\s]+", value) if word]


def numbers(values: Sequence[str] | None, what: str) -> list[int]:
    """The same as whole numbers. UserError naming the option."""
    found = words(values)
    for word in found:
        if not re.fullmatch(r"-?\d+", word):
            raise UserError(f"{what} {word!r} is no number; give whole numbers, as in {what} 1,8")
    return [int(word) for word in found]


def bench_command(args: Any) -> str:
    """Measure what the arguments of the command ask for; the text to print."""
    from muntin.measure.compare import compare
    from muntin.measure.pareto import check_out, pareto, write_pareto
    from muntin.measure.scaling import lines, plot, sizes

    if args.compare:
        return compare(*args.compare)
    if args.plot:
        check_picture(args.plot)
    if args.pareto:
        check_out(args.pareto)
    engines = words(args.engine) or None
    if args.optimize and "optimize" not in (engines or ()):
        engines = [*(engines or ["eager"]), "optimize"]

    from muntin.measure import bench
    from muntin.run import atomic_write

    report = bench(
        args.targets,
        numbers(args.batch, "--batch") if args.batch else None,
        list(sizes(",".join(args.size))) if args.size else None,
        engine=engines,
        precision=words(args.precision) or words([args.dtype or ""]) or None,
        device=args.device,
        threads=args.threads,
        rounds=args.rounds,
        seconds=args.seconds,
        base=args.base,
        memory=not args.no_memory,
        cuda_graphs=args.cuda_graphs,
    )
    if args.json:
        atomic_write(args.json, report.json().encode())
    if args.plot:
        plot(report.rows, args.plot)
    text = [report.table(), *lines(report.scaling)]
    if args.pareto:
        try:
            write_pareto(pareto(report), args.pareto)
        except UserError as error:  # what was measured is told all the same
            text.append(f"{args.pareto} is not drawn: {error}")
    return "\n".join(text)


def check_picture(path: str) -> None:
    """Refuse before the measurement what would fail after it."""
    import importlib.util

    needs = {".png": "matplotlib", ".html": "plotly"}
    package = next((package for suffix, package in needs.items() if path.endswith(suffix)), None)
    if package is None:
        raise UserError(f"--plot {path}: give a name that ends in .png or .html")
    if importlib.util.find_spec(package) is None:
        raise UserError(f'--plot {path} needs the package {package}; install it with: pip install "muntin[analysis]"')
