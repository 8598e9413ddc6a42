"""`clipo ckpt export SRC DST`: a Hugging Face folder from an imported model, Megatron's own checkpoint or a training state."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.cli.transfer_bar import transfer_bar


def add_export_parser(actions: argparse._SubParsersAction) -> None:
    """Declare the action."""
    parser = actions.add_parser(
        "export",
        help="write the model of a distributed checkpoint as a Hugging Face folder",
        description="Exit code 0: DST is complete; 1: a tensor is damaged or the disk is full; 2: the folders can't be used, "
        "or files differ from their checksums. DST is there only when it is complete.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="imported model, Megatron checkpoint, or step folder")
    parser.add_argument("folder", type=Path, metavar="DST", help="Hugging Face folder to write; must not exist")
    parser.add_argument("--dtype", metavar="NAME", help="number format of the weights: float32, bfloat16 or float16")
    parser.add_argument(
        "--config", type=Path, metavar="HF_FOLDER", help="config.json and tokenizer; without it, those that lie in SRC"
    )
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Export, with progress on stderr.

    Raises:
        ConfigError: all reasons why the folders can't be used.
        CheckpointError: a file is damaged, or the disk is full.
    """
    # Imported late: other commands need no torch.
    from clipo_megatron.checkpoint.model_export import export_model

    logging.basicConfig(level=logging.WARNING, format="clipo: %(message)s")
    with transfer_bar("export") as on_progress:
        folder = export_model(args.source, args.folder, dtype=args.dtype, config=args.config, on_progress=on_progress)
    files = list(folder.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    print(f"{folder}: {len(files)} safetensors file{'s' if len(files) > 1 else ''}, {size_text(num_bytes)}")
    return 0
