"""Pairs of an online network and its target, and OpenSelfSup's files without the third copy of the network."""

from __future__ import annotations

from moco_d2.convert.names import SEQUENTIAL
from moco_d2.convert.sources.record import HEADS, ONLINE, QUERY, QUEUE, UNIT_RGB, CheckpointSource, without_fc

ONLINE_NETWORKS = (
    CheckpointSource(
        name="lightning-bolts BYOL or SimSiam",
        key="bolts-byol",
        origin="BYOL or SimSiam of lightning-bolts",
        arxiv="2006.07733, 2011.10566",
        containers=("state_dict",),
        prefix="online_network.encoder.",
        dropped=(
            (r"^(online_network\.)?(projector|predictor)\.", "head of pretraining"),
            without_fc("online_network.encoder."),
        ),
        encoder=ONLINE,
    ),
    CheckpointSource(
        name="lucidrains' BYOL",
        key="byol-lucidrains",
        origin="BYOL of lucidrains",
        arxiv="2006.07733",
        containers=("", "state_dict"),
        prefix="online_encoder.net.",
        dropped=(
            without_fc("online_encoder.net.", "classifier, which was not trained"),
            without_fc("net.", "classifier, which was not trained"),
            (r"^(online_encoder\.projector|online_predictor)\.", "head of pretraining"),
        ),
        encoder=ONLINE,
        notes=("mean and std of the pixels are the user's choice in this code: ImageNet's are assumed",),
    ),
    CheckpointSource(
        name="lucidrains' BYOL, network alone",
        key="byol-lucidrains-net",
        origin="BYOL of lucidrains",
        arxiv="2006.07733",
        containers=("", "state_dict"),
        prefix="net.",
        signature=(r"^(online_encoder|online_predictor|target_encoder)\.",),
        dropped=(
            without_fc("net.", "classifier, which was not trained"),
            (r"^online_predictor\.", "head of pretraining"),
        ),
        encoder=ONLINE,
        notes=("mean and std of the pixels are the user's choice in this code: ImageNet's are assumed",),
    ),
    CheckpointSource(
        name="OpenSelfSup BYOL, backbone cut off",
        key="openselfsup-byol",
        origin="BYOL of OpenSelfSup",
        arxiv="2006.07733",
        containers=("state_dict",),
        prefix="online_net.0.",
        dropped=((r"^online_net\.1\.", "neck"), HEADS),
        encoder=ONLINE,
    ),
    CheckpointSource(
        name="OpenSelfSup MoCo, backbone cut off",
        key="openselfsup-moco",
        origin="MoCo of OpenSelfSup",
        arxiv="1911.05722, 2003.04297",
        containers=("state_dict",),
        prefix="encoder_q.0.",
        dropped=((r"^encoder_q\.1\.", "neck"), QUEUE),
        encoder=QUERY,
    ),
    CheckpointSource(
        name="sthalles' BYOL",
        key="byol-sthalles",
        origin="BYOL of sthalles",
        arxiv="2006.07733",
        containers=("online_network_state_dict",),
        prefix="encoder.",
        naming=SEQUENTIAL,
        dropped=((r"^proje(c)?tion\.", "projection head"),),
        pixels=UNIT_RGB,
        encoder=ONLINE,
    ),
)
