#!/usr/bin/env python3
"""Convert a ResNet checkpoint (moco_d2, MoCo v1/v2, torchvision) to Detectron2's names, and prove it.

Example: convert_checkpoint.py output/backbone.pth output/moco_v2.pth
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter


def main() -> int:
    """Run the conversion and print its account; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="checkpoint: .pth, .pth.tar, .pt, .safetensors or .pkl")
    parser.add_argument("output", help="file to write: .pth (tensors only) or .pkl (numpy arrays)")
    parser.add_argument("--no-proof", action="store_true", help="do not compare with Detectron2's network")
    args = parser.parse_args()

    # After the arguments, so that --help answers at once.
    from moco_d2.convert import can_prove, convert_checkpoint

    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    if not args.no_proof and not can_prove():
        print(
            "error: the proof was not made, and nothing was written: detectron2 is missing; install it "
            "(python -m moco_d2.install_detectron2), or accept an unproven file with --no-proof",
            file=sys.stderr,
        )
        return 2
    try:
        conversion, differences = convert_checkpoint(args.input, args.output, proof=not args.no_proof)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    facts, source = conversion.facts, conversion.source.name
    counts = (("mapped", conversion.mapped), ("dropped", conversion.dropped), ("foreign", conversion.foreign))
    print(f"source   {source}: {facts.origin}" + (f" ({facts.protocol})" if facts.protocol else ""))
    print(f"network  ResNet-{facts.depth}, {facts.stem_channels} channels in the stem, {facts.res2_channels} in res2")
    print("keys     " + ", ".join(f"{len(keys)} {what}" for what, keys in counts))
    for reason, count in Counter(conversion.dropped.values()).items():
        print(f"         dropped {count}: {reason}")
    for group, count in conversion.foreign_groups().items():
        print(f"         foreign {count}: {group}")
    shown = ", ".join(f"{stage} {difference:.1e}" for stage, difference in differences.items())
    print(f"proof    largest relative difference: {shown}" if shown else "proof    not made")
    print(f"written  {args.output}; use it with\n    MODEL.WEIGHTS {args.output}")
    for key, value in facts.config().items():
        print(f"    {key} " + (f'"{value}"' if isinstance(value, list) else str(value)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
