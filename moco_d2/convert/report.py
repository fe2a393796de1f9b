"""Report of a conversion: lines for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from moco_d2.convert.choice import Choice
from moco_d2.convert.conversion import Conversion, config_path
from moco_d2.convert.convert import convert_checkpoint
from moco_d2.convert.keys import dropped_by
from moco_d2.convert.parts import part_of
from moco_d2.convert.prove import TOLERANCE, other_padding, read_picture
from moco_d2.convert.prove_vit import measure_apart
from moco_d2.convert.sources import unwrap
from moco_d2.facts import BackboneFacts, ResNetFacts, ViTFacts
from moco_d2.io.checkpoints import checkpoint_sha256, some
from moco_d2.io.files import check_named_file, has_keys, named_file
from moco_d2.io.provenance import provenance, sha256

_GROUPS = 8  # of foreign keys that the summary lists


def convert_and_report(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    proof: bool = True,
    choice: Choice | None = None,
    picture: str | os.PathLike[str] | None = None,
    bake: bool = False,
) -> dict[str, Any]:
    """Convert a checkpoint and return the report; see :func:`convert_checkpoint` and :func:`report`."""
    image = None if picture is None else read_picture(picture)
    conversion, differences = convert_checkpoint(source, output, proof, choice, image, bake)
    content = report(conversion, differences, source, output)
    reasons = Counter(conversion.dropped.values())
    content["drop"] = {pattern: reasons[dropped_by(pattern)] for pattern in (choice.drop if choice else ())}
    if picture is not None and proof:
        content["proof"]["picture"] = {"path": str(picture), "sha256": sha256(os.fspath(picture))}
    return content


def report(
    conversion: Conversion,
    differences: Mapping[str, float],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> dict[str, Any]:
    """Return everything about a conversion, as plain values.

    Args:
        conversion: what was converted.
        differences: largest relative difference per stage, empty without a proof.
        source: the checkpoint.
        output: the file that was written.
    """
    record = conversion.source
    return {
        "source": {
            "name": record.name,
            "key": record.key,
            "arxiv": conversion.arxiv,
            "place": conversion.place,
            "prefix": record.prefix,
            "encoder": record.encoder,
            "also": list(conversion.also),
        },
        "counts": {what: len(getattr(conversion, what)) for what in ("mapped", "dropped", "foreign")},
        "mapped": conversion.mapped,
        "dropped": conversion.dropped,
        "foreign": conversion.foreign,
        "elsewhere": dict(conversion.elsewhere),
        "facts": conversion.facts.as_dict(),
        "norm": getattr(conversion.facts, "norm", ""),
        "notes": list(conversion.notes),
        "proof": {"made": bool(differences), "tolerance": TOLERANCE, "differences": dict(differences)},
        "source_padding": _other_padding(conversion),
        "apart": measure_apart(conversion.facts, conversion.source_tensors, conversion.tensors)
        if differences and isinstance(conversion.facts, ViTFacts)
        else {},
        "input": {"path": str(source), "sha256": conversion.source_sha256 or checkpoint_sha256(source)},
        "output": {"path": str(output), "sha256": sha256(os.fspath(output)), "config": str(config_path(output))},
        "config": conversion.config(),
        **provenance(),
    }


def _other_padding(conversion: Conversion) -> dict[str, float]:
    facts, padding = conversion.facts, conversion.source.padding
    if not padding or not isinstance(facts, ResNetFacts):
        return {}
    return other_padding(facts, conversion.source_tensors, padding, conversion.source_pixels)


is_report = has_keys("source", "mapped", "facts", "proof", "command")


def check_report(path: str | os.PathLike[str], source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Check, before a conversion, that its report can be written after it.

    Raises:
        ValueError: the name is that of the weights, of their config, or of a file that is not a report.
    """
    for other in (source, output, config_path(output)):
        if os.path.realpath(path) == os.path.realpath(other):
            raise ValueError(
                f"{path}: another file of this conversion has this name; choose another one for the report"
            )
    check_named_file(path, is_report)


def write_report(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a report as JSON; only an earlier report is overwritten.

    Raises:
        ValueError: a file of another kind has the name, or it is not writable.
    """
    with named_file(path, is_report) as file:
        file.write(json.dumps(content, indent=2).encode())


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return a report's main points as lines."""
    facts, source, proof = content["facts"], content["source"], content["proof"]["differences"]
    paper = f", arXiv {source['arxiv']}" if source["arxiv"] else ""
    recipe = f" ({facts['recipe']})" if facts["recipe"] else ""
    lines = [f"source   {source['name']}: {some([facts['origin']])}{recipe}{paper}"]
    lines += [f"         its files look like those of {', '.join(source['also'])}"] if source["also"] else []
    where = " in ".join(
        f"`{part}`" for part in (source["prefix"] + "*" if source["prefix"] else "", source["place"]) if part
    )
    lines += (
        [f"encoder  {'; '.join(part for part in (where, source['encoder']) if part)}"]
        if where or source["encoder"]
        else []
    )
    if facts["parts"]:
        counts = Counter(part_of(name) for name in content["mapped"].values())
        converted = ", ".join(f"{part} ({counts[part]} tensors)" for part in facts["parts"])
        lines.append(f"parts    {converted}; fine-tuning from them is another protocol than from a backbone alone")
    lines.append(f"network  {_network(facts)}")
    lines.append("keys     " + ", ".join(f"{count} {what}" for what, count in content["counts"].items()))
    lines += [f"         dropped {n}: {reason}" for reason, n in Counter(content["dropped"].values()).items()]
    foreign = Counter(unwrap(key).partition(".")[0] for key in content["foreign"]).most_common()
    lines += [f"         foreign {n}: {group}" for group, n in foreign[:_GROUPS]]
    lines += [f"         and {len(foreign) - _GROUPS} more groups of foreign keys"] if len(foreign) > _GROUPS else []
    elsewhere = ", ".join(f"{key} ({n} tensors)" if n else key for key, n in content["elsewhere"].items())
    lines += [f"besides  {elsewhere}"] if elsewhere else []
    lines += [f"note     {note}" for note in content["notes"]]
    if content["source_padding"]:
        lines.append(f"padding  mean relative difference to the source's own: {_stages(content['source_padding'])}")
    lines.append(f"proof    largest relative difference: {_stages(proof)}" if proof else "proof    not made")
    if content["apart"]:
        lines.append(
            "apart    mean relative difference of the tokens to those of the source with its class token, which"
        )
        lines.append(
            "         Detectron2's ViT leaves out, and to pretraining's on pictures of 1.5 and 0.5 times the size, for"
        )
        lines.append(f"         which both resize the position embedding: {_stages(content['apart'])}")
    picture = content["proof"].get("picture")
    lines += [f"         on {picture['path']}, sha256 {picture['sha256']}"] if picture else []
    lines += [f"sha256   {content[end]['sha256']}  {content[end]['path']}" for end in ("input", "output")]
    lines.append(f"written  {content['output']['path']}; use it with _BASE_: {content['output']['config']}, or with")
    lines.append(f"    MODEL.WEIGHTS {content['output']['path']}")
    lines += [f"    {k} " + (f'"{v}"' if isinstance(v, list) else str(v)) for k, v in content["config"].items()]
    return lines


def _network(facts: Mapping[str, Any]) -> str:
    network = BackboneFacts.from_dict(facts)
    if isinstance(network, ViTFacts):
        return f"{network.network}, pretrained on {network.image}x{network.image} pixels"
    if not isinstance(network, ResNetFacts):
        return network.network
    groups = f", {network.groups} groups of {network.width_per_group}" if network.groups > 1 else ""
    return (
        f"{network.network}, {network.stem_channels} channels in the stem, {network.res2_channels} in res2{groups}"
        + (", GroupNorm" if network.norm == "GN" else "")
    )


def _stages(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {difference:.1e}" for stage, difference in differences.items())
