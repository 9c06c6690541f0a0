"""What a checkpoint's own files, and a user's options, say about pooling."""

from __future__ import annotations

import json

import pytest
from qeff_proxy.errors import CheckpointError, UnsupportedModelError
from qeff_proxy_embedding.pooling import Pooling, pooling_of_options
from qeff_proxy_embedding.sentence_folder import read_sentence_folder

TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
LSTM = {"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}
DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes the files of a sentence-transformers checkpoint."""

    def write(modules, config=None):
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        if config is not None:
            (tmp_path / "1_Pooling").mkdir()
            (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": ["max", "cls"]}, "max+cls"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls+mean"),
    ],
)
def test_the_checkpoints_pooling_is_read_in_both_its_forms(checkpoint, config, name):
    folder = read_sentence_folder(checkpoint([TRANSFORMER, POOLING, NORMALIZE], config))
    assert pooling_of_options({}, folder, 32) == Pooling(name, normalize=True)


def test_a_checkpoint_that_says_nothing_pools_nothing(tmp_path):
    assert pooling_of_options({}, read_sentence_folder(tmp_path), 32) == Pooling("none")


def test_with_a_pooling_of_the_users_only_what_else_is_given_counts(checkpoint):
    folder = read_sentence_folder(
        checkpoint([TRANSFORMER, POOLING, NORMALIZE], {"pooling_mode_cls_token": True})
    )
    assert pooling_of_options({"pooling": "mean"}, folder, 32) == Pooling("mean")
    assert pooling_of_options({"normalize": False}, folder, 32) == Pooling("cls")


def test_what_a_proxy_remembers_makes_the_same_pooling_again(checkpoint):
    pooling = Pooling("last", normalize=True, truncate_dim=8)
    assert pooling_of_options({**pooling.to_json(), "max_length": 9}, None, 32) == pooling


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        ([TRANSFORMER, POOLING, LSTM], {"pooling_mode": "mean"}, "LSTM"),
        ([TRANSFORMER, POOLING, NORMALIZE, DENSE], {"pooling_mode": "mean"}, "Normalize, Dense"),
        ([TRANSFORMER, POOLING], {"pooling_mode_strange_tokens": True}, "strange"),
        ([TRANSFORMER, POOLING], {"pooling_mode": ["cls", "strange"]}, "cls and strange"),
        ([TRANSFORMER, POOLING], {}, "of nothing"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_its_name(checkpoint, modules, config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read_sentence_folder(checkpoint(modules, config))


@pytest.mark.parametrize("modules", ["nonsense", [{}], [POOLING], {"type": 3}])
def test_damaged_files_are_named(checkpoint, modules):
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_sentence_folder(checkpoint(modules))
