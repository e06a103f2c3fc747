"""Malformed files of a folder: each is read, or refused with a BundleError, and no other exception."""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberpc.bundle import BundleError, Head, Reference
from emberpc.bundle.contents import Contents
from emberpc.bundle.tokenizer_settings import check_tokenizer

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["Lowercase", "Sequence", "TemplateProcessing"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "single", "processors", "normalizers", "lowercase", "content", "id", "SpecialToken", "type_id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
TOKENIZER_KEYS = ["normalizer", "pre_tokenizer", "post_processor", "added_tokens", "truncation", "model"]
SETTING_KEYS = ["do_lower_case", "add_prefix_space", "add_bos_token", "added_tokens_decoder", "model_max_length"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokenizer=ANY_JSON | st.dictionaries(st.sampled_from(TOKENIZER_KEYS), ANY_JSON, max_size=3),
    stated=ANY_JSON | st.dictionaries(st.sampled_from(SETTING_KEYS), ANY_JSON, max_size=3),
    feeds_types=st.booleans(),
)
def test_any_json_of_a_tokenizer_is_read_or_refused_with_a_bundle_error(
    tmp_path: Path, tokenizer: object, stated: object, feeds_types: bool
) -> None:
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", stated)):
        (tmp_path / name).write_text(json.dumps(value))
    with suppress(BundleError):
        check_tokenizer(tmp_path, feeds_types=feeds_types)


def test_a_tokenizer_whose_template_holds_no_objects_is_refused(tmp_path: Path) -> None:
    processor = {"type": "TemplateProcessing", "single": [1]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    with pytest.raises(BundleError, match="is no tokenizer"):
        check_tokenizer(tmp_path, feeds_types=True)


def test_a_loop_of_symbolic_links_is_refused_with_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("other.json")
    (tmp_path / "other.json").symlink_to("tokenizer.json")
    with pytest.raises(BundleError, match="cannot be read"):
        Contents().read(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="is no tokenizer"):
        check_tokenizer(tmp_path, feeds_types=False)


@pytest.mark.parametrize("read", [lambda folder: Head.read(folder, 2, 2), Reference.read])
@pytest.mark.parametrize("damage", ["method", "encrypted", "text"])
def test_an_npz_file_that_numpy_cannot_read_is_refused(tmp_path: Path, read: object, damage: str) -> None:
    assert callable(read)
    array = io.BytesIO()
    np.save(array, np.zeros((2, 2), dtype=np.float32))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("weights", "bias", "texts", "embeddings"):
            archive.writestr(
                name if damage == "text" else f"{name}.npy", b"text" if damage == "text" else array.getvalue()
            )
    data = bytearray(content.getvalue())
    start = -1
    # In the central directory: bit 0 of the flags says that a member is encrypted; 99 is no method that zipfile knows.
    while (start := data.find(b"PK\x01\x02", start + 1)) >= 0 and damage != "text":
        data[start + (8 if damage == "encrypted" else 10)] = 1 if damage == "encrypted" else 99
    for name in ("head.npz", "reference.npz"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BundleError, match="cannot be read as|has a member that is no array"):
        read(tmp_path)
