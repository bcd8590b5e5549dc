"""Command line: `vqkernels info | demo | train | sample`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vqkernels.training.demo import DemoSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, said in one line)."""
    arguments = _parser().parse_args(argv)
    try:
        return cast(int, arguments.run(arguments))
    except (ImportError, OSError, ValueError) as error:
        print(f"vqkernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _info(arguments: argparse.Namespace) -> int:
    from vqkernels.info import main as info

    return info(["--verbose"] if arguments.verbose else [])


def _demo(arguments: argparse.Namespace) -> int:
    from vqkernels.training.demo import run_demo, smoke_settings

    settings = _settings(arguments)
    run_demo(smoke_settings(settings) if arguments.smoke else settings)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from vqkernels.training.demo import load_and_split, train_pipeline
    from vqkernels.training.pictures import save_curves

    settings = _settings(arguments)
    training, held_out = load_and_split(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    pipeline, histories = train_pipeline(training, held_out, settings)
    pipeline.save(settings.out)
    save_curves(*histories, settings.out / "curves.png")
    print(f"vqvae.safetensors, dit.safetensors and curves.png are in {settings.out}/")
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    import torch

    from vqkernels.training.pictures import save_grid
    from vqkernels.training.pipeline import Pipeline

    pipeline = Pipeline.load(arguments.checkpoint)
    names = arguments.classes or pipeline.class_names
    unknown = [name for name in names if name not in pipeline.class_names]
    if unknown:
        known = ", ".join(pipeline.class_names)
        raise ValueError(f"class {unknown[0]!r} is not one of those trained on: {known}")
    labels = torch.tensor([pipeline.class_names.index(name) for name in names])
    images = pipeline.sample(
        labels.repeat_interleave(arguments.count),
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        progress=True,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, arguments.count, arguments.out)
    print(f"{len(images)} samples, one row a class ({', '.join(names)}), in {arguments.out}")
    return 0


def _settings(arguments: argparse.Namespace) -> DemoSettings:
    from dataclasses import replace

    from vqkernels.training.demo import DemoSettings

    settings = DemoSettings(
        data=arguments.data,
        image_size=arguments.image_size,
        out=arguments.out,
        seed=arguments.seed,
    )
    if arguments.vqvae_steps is not None:
        settings = replace(settings, vqvae=replace(settings.vqvae, steps=arguments.vqvae_steps))
    if arguments.dit_steps is not None:
        settings = replace(settings, dit=replace(settings.dit, steps=arguments.dit_steps))
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqkernels",
        description="Kernels, and a small model layer, for vector quantizers and "
        "Diffusion Transformers.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser(
        "info", help="versions, what was built, which kernel serves which op"
    )
    info.add_argument(
        "-v", "--verbose", action="store_true", help="every backend's say on every op"
    )
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="train a VQ-VAE and a DiT on handwritten digits, sample, and measure"
    )
    _add_training_options(demo, out=Path("out/demo"))
    demo.add_argument(
        "--smoke", action="store_true", help="the same path in seconds, without learning much"
    )
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a VQ-VAE and a DiT, and save them")
    _add_training_options(train, out=Path("out/train"))
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="sample a picture from saved models")
    sample.add_argument(
        "--checkpoint", type=Path, default=Path("out/demo"), help="folder that holds "
        "vqvae.safetensors and dit.safetensors (default: %(default)s)",
    )  # fmt: skip
    sample.add_argument(
        "--out", type=Path, default=Path("out/samples.png"), help="default: %(default)s"
    )
    sample.add_argument(
        "--classes", nargs="+", metavar="NAME", help="one row each (default: every class)"
    )
    sample.add_argument(
        "--count", type=_positive, default=10, help="samples a class (default: %(default)s)"
    )
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    sample.add_argument(
        "--steps", type=_positive, default=25, help="Euler steps (default: %(default)s)"
    )
    sample.add_argument(
        "--guidance", type=float, default=2.0, help="1 is without (default: %(default)s)"
    )
    sample.set_defaults(run=_sample)
    return parser


def _add_training_options(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of images (subfolders are classes), .npy images, or .npz images and labels "
        "(default: 5,000 handwritten digits)",
    )
    parser.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="side to resize to, a multiple of 4"
    )
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--vqvae-steps", type=_positive, help="training steps of the VQ-VAE")
    parser.add_argument("--dit-steps", type=_positive, help="training steps of the DiT")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
