"""The command line.  Subcommands import what they need when they run, so that `--help` needs no jax."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moejax.config import ConfigError, load_config

Result = tuple[dict[str, Any], str | None]  # what --json prints, and what is printed without it


def train(args: argparse.Namespace) -> Result:
    """Train a config, or go on with its run folder."""
    for name in ("coordinator", "processes", "process"):
        if getattr(args, name) is not None:
            os.environ[f"MOEJAX_{name.upper()}"] = getattr(args, name)
    from moejax.train.loop import train

    return {"run_dir": args.config.run_dir} | train(args.config), None


def verify(args: argparse.Namespace) -> Result:
    """Prove that meshes, dispatchers and microbatches give the same numbers."""
    from moejax.train.verify import verify

    return verify(args.config, args.steps), None


def generate(args: argparse.Namespace) -> Result:
    """Continue a prompt with a trained run."""
    from moejax import api

    model = api.load(args.run, args.overrides)
    trained, length = model.config.data.sequence, len(model.prompt(args.prompt, args.chat))
    new = max(trained - length, 1) if args.max_new_tokens is None else args.max_new_tokens
    if length + new > trained:
        print(f"moejax generate: {length + new} tokens are more than the {trained} of data.sequence in training; what "
              "comes after is likely to be worse", file=sys.stderr)
    text, = api.generate(model, [args.prompt], new, args.temperature, args.top_p, args.seed, args.chat, [args.image])
    result = {"prompt": args.prompt, "text": text}
    with (Path(args.run) / "samples.jsonl").open("a", encoding="utf-8") as file:
        shown = {"images": [os.path.abspath(path) for path in args.image]} if args.image else {}
        file.write(json.dumps(result | shown) + "\n")
    return result, text if args.chat else args.prompt + text


def import_(args: argparse.Namespace) -> Result:
    """Make a run folder of a Hugging Face checkpoint."""
    from moejax import api

    result = api.import_folder(args.folder, args.run, args.overrides)
    return result, f"{result['run_dir']}  {result['family']}, {result['parameters']:,} parameters"


def export(args: argparse.Namespace) -> Result:
    """Write a run's weights as a Hugging Face checkpoint."""
    from moejax import api

    result = api.export_run(args.run, args.folder, args.dtype, args.overrides)
    return result, (f"{result['folder']}  {result['family']}, {result['tensors']} tensors, "
                    f"{result['bytes'] / 1e6:,.1f} MB")


def plan(args: argparse.Namespace) -> Result:
    """What a config costs: parameters, FLOPs, memory, traffic, time and price."""
    if sum((args.schedule, args.leak, args.search, args.inference)) > 1:
        raise ConfigError(["moejax plan takes one of --schedule, --leak, --search and --inference at a time"])
    if args.schedule:
        from moejax.parallel import schedules

        table = schedules.make(args.config)
        text = f"{table.show(shutil.get_terminal_size((160, 24)).columns)}\n{schedules.describe(table)}"
        return {"schedule": table.name, "stages": table.stages, "microbatches": table.microbatches,
                "chunks": table.chunks, "ticks": len(table.ticks), "bubble": table.bubble(),
                "peak_inflight": table.peak_inflight()}, text
    from moejax.plan import budget, inference, leak, search

    if args.leak:
        found = leak.figures(args.config)
        return {"figures": [one._asdict() | {"residual": one.residual} for one in found]}, leak.text(found)
    if args.search:
        result = search.search(args.config, args.on, args.top)
        return result, search.text(result)
    if args.inference:
        result = inference.inference(args.config, args.on, Path(args.config.run_dir, "plan"))
        return result, inference.text(result)
    result = budget.plan(args.config, args.on, args.tokens, args.mfu)
    return result, budget.text(result)


def compile_(args: argparse.Namespace) -> Result:
    """Compile a config's training step for devices that need not be there, and hold the plan against it."""
    from moejax.plan import compile

    result = compile.compile_step(args.config, args.devices, args.topology)
    return result, compile.text(result)


def report(args: argparse.Namespace) -> Result:
    """Write a run's report.html with its curves."""
    from moejax.train.report import write_report

    path = write_report(Path(args.run))
    return {"report": str(path)}, str(path)


def checkpoint(args: argparse.Namespace) -> Result:
    """Checkpoints of a run: list, verify, or diff with another bit by bit (each RUN or RUN@STEP)."""
    if args.action not in ("list", "verify", "diff"):
        raise ConfigError([f"moejax checkpoint takes list, verify or diff; got {args.action!r}"])
    if (args.action == "diff") != (args.other is not None):
        raise ConfigError([f"checkpoint {args.action} takes {'one run; got 2' if args.other else 'two runs; got 1'}"])
    from moejax.train import archive

    if args.action == "list":
        rows = archive.contents(args.run)
        lines = [f"step {row['step']}  damaged: {row['damaged']}" if "damaged" in row else
                 f"step {row['step']}  {row['tokens']:,} tokens  {row['arrays']} arrays  {row['bytes'] / 1e6:,.1f} MB  "
                 f"saved {row['saved']}" for row in rows]
        result = {"checkpoints": rows}
    elif args.action == "verify":
        found = archive.verify(args.run)
        lines = [f"step {step}  {'damaged: ' + what if what else 'good'}" for step, what in found.items()]
        result = {"passed": not any(found.values()), "damaged": {step: what for step, what in found.items() if what}}
    else:
        result = archive.diff(args.run, args.other)
        differ = result["differ"]
        lines = [f"{name}  {what}" for name, what in differ.items()]
        lines.append(f"{len(differ)} of {result['arrays']} arrays differ between {result['a']} and {result['b']}"
                     if differ else f"all bits of {result['arrays']} arrays are equal")
        result["passed"] = not differ
    return result, "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="moejax", description="Train, verify and use mixture-of-experts transformers.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], Result], *positional: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__.rstrip("_"), help=function.__doc__, description=function.__doc__)
        for name in positional:
            sub.add_argument(name, metavar=name.upper())
        if function not in (report, checkpoint):
            sub.add_argument("overrides", nargs="*", default=[], metavar="path.to.field=value",
                             help="change the config")
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
        sub.set_defaults(function=function)
        return sub

    run = command(train, "config")
    run.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 (as MOEJAX_COORDINATOR), or auto")
    run.add_argument("--processes", metavar="N", help="how many train together (as MOEJAX_PROCESSES)")
    run.add_argument("--process", metavar="I", help="which of them this is, from 0 (as MOEJAX_PROCESS)")
    command(verify, "config").add_argument("--steps", type=int, default=2, help="training steps to compare (2)")
    text = command(generate, "run", "prompt")
    text.add_argument("--chat", action="store_true", help="PROMPT is what a user says, for the chat template to put")
    text.add_argument("--image", action="append", default=[], metavar="FILE",
                      help="a picture or video for the next <image> of PROMPT; may be given several times")
    text.add_argument("--max-new-tokens", type=int, help="default: up to the sequence length of training")
    text.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    text.add_argument("--top-p", type=float, default=0.95, help="draw among the likeliest up to this share (0.95)")
    text.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    command(import_, "folder", "run")
    command(export, "run", "folder").add_argument("--dtype", help="float32, bfloat16 or float16; default: as imported, "
                                                                  "else float32")
    costs = command(plan, "config")
    costs.add_argument("--on", default="H100", metavar="DEVICExN", help="devices to plan for, such as H100x1024; "
                       "cpu is measured (H100, as many as the mesh needs)")
    costs.add_argument("--tokens", type=float, help="of the whole training (those of train.steps)")
    costs.add_argument("--mfu", type=float, help="FLOP/s utilisation to reckon with, as 0.35 (the roofline's)")
    costs.add_argument("--top", type=int, default=10, help="layouts that --search shows (10)")
    for name, what in (("schedule", "draw the ticks of the pipeline"), ("search", "find the fastest layout that fits"),
                       ("inference", "latency and throughput in use, with a picture in the run folder"),
                       ("leak", "published figures of the model of configs/gpt4.py beside ours")):
        costs.add_argument(f"--{name}", action="store_true", help=what)
    ahead = command(compile_, "config")
    ahead.add_argument("--devices", type=int, default=0, metavar="N",
                       help="fake CPU devices (as many as the mesh needs)")
    ahead.add_argument("--topology", default="", help="TPUs or GPUs instead, such as v5p:8x8x4 or h200:8")
    command(report, "run")
    command(checkpoint, "action", "run").add_argument("other", metavar="RUN", nargs="?", help="to compare with (diff)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 it ran and failed, 2 what was asked for is wrong."""
    args, rest = parser().parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in args):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = [*vars(args).get("overrides", ()), *rest]  # argparse gives up those after an option
    try:
        if "config" in args:
            # A search sets the microbatches itself: those of the config need not divide another batch.
            alone = ["train.microbatches=1"] * getattr(args, "search", False)
            args.config = load_config(args.config, args.overrides + alone)
        result, text = args.function(args)
    except ConfigError as error:
        print(f"moejax {args.command}: {len(error.problems)} problem{'s' * (len(error.problems) > 1)}\n{error}",
              file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__module__.split(".")[0] != "moejax":
            raise  # not one of ours to explain
        print(f"moejax {args.command}: {error}", file=sys.stderr)
        return 1
    if args.json or text is not None:
        print(json.dumps(result) if args.json else text)
    return 0 if result.get("passed", True) else 1


def run() -> int:
    """The `moejax` command; on Linux with large pages: clearing small ones takes XLA a third of a step on a CPU."""
    large = sys.argv[1:2] in (["train"], ["verify"], ["import"])
    if large and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, "-m", "moejax.cli", *sys.argv[1:]])
    if "--json" in sys.argv and "MOEJAX_COORDINATOR" in os.environ:  # libraries write to stdout from C++ there
        sys.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    hook = sys.unraisablehook  # Orbax closes a loop in which TensorStore's failures still arrive
    sys.unraisablehook = lambda found: "Event loop is closed" in str(found.exc_value) or hook(found)
    status = main()
    if status and "MOEJAX_COORDINATOR" in os.environ:  # no leave to take from processes that may be dead
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(run())
