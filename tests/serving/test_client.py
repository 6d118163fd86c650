"""The tensor codec against TensorFlow's own, the client and `dpsr query` against real model servers."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import PATIENCE_S, child_environment, run_command

from dpsr_common import serving_apis
from dpsr_common.command_line import main
from dpsr_serving.client import SearchClient, ServingError, retriever
from dpsr_serving.model_server import ModelServer
from dpsr_serving.tensors import make_tensor, to_numpy

NUMERIC = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


@pytest.fixture
def shop(servers: dict[str, ModelServer]) -> Iterator[SearchClient]:
    with SearchClient(servers["shop"].target, "shop") as client:
        yield client


def to_tensorflow(tf: Any, proto: Any) -> Any:
    from tensorflow.core.framework import tensor_pb2

    return tf.make_ndarray(tensor_pb2.TensorProto.FromString(proto.SerializeToString()))


def from_tensorflow(proto: Any) -> Any:
    return serving_apis.TensorProto.FromString(proto.SerializeToString())


def typed(dtype: int, sizes: tuple[int, ...], **fields: Any) -> Any:
    proto = serving_apis.TensorProto(dtype=dtype, **fields)
    proto.tensor_shape.SetInParent()
    for size in sizes:
        proto.tensor_shape.dim.add(size=size)
    return proto


# Tensors


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from(NUMERIC))
def test_numbers_go_to_tensorflow_and_back(tf: Any, data: st.DataObject, dtype: str) -> None:
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
    proto = make_tensor(array)
    for decoded in (to_tensorflow(tf, proto), to_numpy(proto), to_numpy(from_tensorflow(tf.make_tensor_proto(array)))):
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("dtype", NUMERIC)
def test_typed_fields_repeat_their_last_value(tf: Any, dtype: str) -> None:
    number = make_tensor(np.zeros(0, dtype)).dtype
    # TensorFlow packs a constant array into one value of the typed field.
    packed = tf.make_tensor_proto(np.ones(1, dtype), shape=[2, 3])
    assert not packed.tensor_content
    for proto, expected in (
        (from_tensorflow(packed), np.ones((2, 3), dtype)),
        (typed(number, (2,)), np.zeros(2, dtype)),
    ):
        decoded = to_numpy(proto)
        assert decoded.dtype == expected.dtype
        np.testing.assert_array_equal(decoded, expected)
        np.testing.assert_array_equal(decoded, to_tensorflow(tf, proto))


@settings(deadline=None)
@given(strings=st.lists(st.one_of(st.text(), st.binary()), min_size=1))
def test_strings_go_to_tensorflow_and_back(tf: Any, strings: list[str | bytes]) -> None:
    expected = [text.encode() if isinstance(text, str) else text for text in strings]
    proto = make_tensor(strings)
    assert to_tensorflow(tf, proto).tolist() == expected
    assert to_numpy(proto).tolist() == expected
    assert to_numpy(from_tensorflow(tf.make_tensor_proto(expected))).tolist() == expected


def test_string_shapes(tf: Any) -> None:
    square = np.array([["a", "bc"], ["", "é"]], object)
    for values, shape in (
        ("text", ()),
        (b"\xff\x00", ()),
        (square, (2, 2)),
        (square.astype(str), (2, 2)),
        (["a"], (1,)),
    ):
        assert to_numpy(make_tensor(values)).shape == to_tensorflow(tf, make_tensor(values)).shape == shape
    assert to_numpy(typed(7, (3,), string_val=[b"a", b"b"])).tolist() == [b"a", b"b", b"b"]
    assert to_numpy(typed(7, (2,))).tolist() == [b"", b""]
    assert to_numpy(typed(7, (0,))).shape == (0,)


def test_string_tensor_content(tf: Any) -> None:
    strings = [b"", b"a", b"\x00", b"x" * 300]
    # What a server with --enable_serialization_as_tensor_content sends; TensorFlow's Python cannot make it.
    proto = typed(7, (2, 2), tensor_content=b"\x00\x01\x01\xac\x02" + b"".join(strings))
    assert to_numpy(proto).tolist() == [strings[:2], strings[2:]]


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (typed(1, (2,), tensor_content=b"1234567"), "7 bytes; shape [2] of float32 needs 8"),
        (typed(1, (1,), float_val=[1.0, 2.0]), "2 values, but its shape has 1 elements"),
        (typed(7, (1,), string_val=[b"a", b"b"]), "2 values, but its shape has 1 elements"),
        (typed(1, (-1,), float_val=[1.0]), "complete shape, got [-1]"),
        (typed(1, (1 << 40,), float_val=[1.0]), "larger than any message"),
        (typed(7, (1 << 62, 1 << 62), string_val=[b"a"]), "larger than any message"),
        (typed(6, (1,), int_val=[200]), "value 200 is out of the range of int8"),
        (typed(17, (1,), int_val=[-1]), "value -1 is out of the range of uint16"),
        (typed(8, (1,), scomplex_val=[1.0, 0.0]), "dtype 8"),
        (typed(0, (1,)), "dtype 0"),
        (typed(7, (2,), tensor_content=b"\x01"), "a length is too long or cut off"),
        (typed(7, (1,), tensor_content=b"\xff\xff\xff\xff\xff\xff\x01"), "a length is too long or cut off"),
        (typed(7, (1,), tensor_content=b"\x05abc"), "has 4 bytes, expected 6"),
    ],
)
def test_broken_tensors_are_value_errors(proto: Any, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        to_numpy(proto)
    assert words in str(raised.value)


def test_unknown_rank_is_a_value_error() -> None:
    proto = serving_apis.TensorProto(dtype=1, float_val=[1.0])
    proto.tensor_shape.unknown_rank = True
    with pytest.raises(ValueError, match="unknown rank"):
        to_numpy(proto)


def test_what_cannot_become_a_tensor() -> None:
    with pytest.raises(ValueError, match="complex"):
        make_tensor(np.zeros(1, complex))
    with pytest.raises(ValueError, match="surrogates"):
        make_tensor(["\udcff"])
    with pytest.raises(TypeError, match="NoneType"):
        make_tensor(["a", None])  # type: ignore[list-item]


@settings(deadline=None)
@given(junk=st.binary(max_size=60))
def test_decoding_junk_raises_nothing_but_value_error(junk: bytes) -> None:
    proto = serving_apis.TensorProto()
    try:
        proto.MergeFromString(junk)
    except Exception:
        return
    with contextlib.suppress(ValueError):
        to_numpy(proto)


def test_decoded_arrays_may_be_written_to() -> None:
    for array in (np.zeros(2, np.float32), np.zeros(2, bool), np.array([b"a", b"b"], object)):
        to_numpy(make_tensor(array))[0] = 1


# The client


def test_search_leaves_k_to_the_servable_or_gives_it(shop: SearchClient) -> None:
    short, empty, long = shop.search(["ab", "", "abcdefgh"])
    assert short.item_ids.tolist() == [100, 101] and short.heads.tolist() == [0, 1]
    assert np.allclose(short.scores, [1, 0.5])
    assert len(empty) == 0
    assert long.item_ids.tolist() == [100, 101, 102]  # the model's own k is 3
    (result,) = shop.search("abcdefgh", k=5)
    assert result.item_ids.tolist() == [100, 101, 102, 103, 104]
    assert (result.item_ids.dtype, result.scores.dtype, result.heads.dtype) == (np.int64, np.float32, np.int32)
    assert result.item_keys is None


def test_search_takes_text_or_bytes(shop: SearchClient) -> None:
    assert [len(result) for result in shop.search([b"\xff\xfe", "é", "\x00"], k=9)] == [2, 2, 1]
    assert len(shop.search(b"abc")) == 1
    assert shop.search([]) == []


def test_item_keys_where_the_shop_has_strings(servers: dict[str, ModelServer]) -> None:
    with SearchClient(servers["keyed"].target, "keyed") as client:
        two, none = client.search(["ab", ""], k=4)
    assert two.item_keys == ("sku-200", "sku-201")
    assert none.item_keys == ()


def test_model_status(shop: SearchClient) -> None:
    (version,) = shop.model_status()
    assert (version.version, version.state, version.error) == (7, "AVAILABLE", "")


def test_unknown_model_names_target_and_model(servers: dict[str, ModelServer]) -> None:
    target = servers["shop"].target
    with SearchClient(target, "nowhere") as client:
        for ask in (lambda: client.search("a"), lambda: client.search("a", 3), client.model_status):
            with pytest.raises(ServingError) as raised:
                ask()
            assert raised.value.code is grpc.StatusCode.NOT_FOUND
            assert target in raised.value.message and "'nowhere'" in raised.value.message


def test_no_server_names_the_address_and_the_command() -> None:
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{closed.getsockname()[1]}"
        with SearchClient(target, "shop") as client, pytest.raises(ServingError) as raised:
            client.search("a")
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert target in raised.value.message and "dpsr serve" in raised.value.message


def test_deadline(servers: dict[str, ModelServer]) -> None:
    with SearchClient(servers["shop"].target, "shop", 0.001) as client, pytest.raises(ServingError) as raised:
        client.search(["x" * 1000] * 1000, k=10_000)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED and "0.001 s" in raised.value.message


def test_bad_arguments(shop: SearchClient) -> None:
    for k in (0, -1, 2**31):
        with pytest.raises(ValueError, match="k must be"):
            shop.search("a", k)
    with pytest.raises(ValueError, match="surrogates"):
        shop.search("\udcff")
    for arguments in (("", "m"), ("h:1", ""), ("h:1", "m", 0)):
        with pytest.raises(ValueError):
            SearchClient(*arguments)  # type: ignore[arg-type]


def test_retriever_pads_and_batches(servers: dict[str, ModelServer]) -> None:
    retrieve = retriever(servers["shop"].target, "shop", batch_size=2)
    ids, scores = retrieve(["a", "", "abcdefgh", "ab", "abc"], None, 4)
    assert ids.dtype == np.int64 and scores.dtype == np.float32
    assert ids.tolist() == [
        [100, -1, -1, -1],
        [-1, -1, -1, -1],
        [100, 101, 102, 103],
        [100, 101, -1, -1],
        [100, 101, 102, -1],
    ]
    assert np.array_equal(np.isneginf(scores), ids == -1)
    assert retrieve([], None, 4)[0].shape == (0, 4)
    assert retrieve(["a"], [None], 1)[0].tolist() == [[100]]
    with pytest.raises(ValueError, match="without user features"):
        retrieve(["a"], [{"age": 3}], 1)
    assert not retrieve.personal  # type: ignore[attr-defined]


def test_client_and_tensorflow_serving_api_live_in_one_process(servers: dict[str, ModelServer]) -> None:
    # Both define tensorflow.serving.PredictRequest; the client's pool is its own.
    from tensorflow_serving.apis import predict_pb2

    assert predict_pb2.PredictRequest.DESCRIPTOR is not serving_apis.PredictRequest.DESCRIPTOR
    with SearchClient(servers["shop"].target, "shop") as client:
        assert len(client.search("a")[0]) == 1


def test_imports_neither_tensorflow_nor_our_other_packages() -> None:
    code = (
        "import sys, dpsr_serving.client, dpsr_serving.query, dpsr_serving.model_server\n"
        "print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    loaded = set(result.stdout.split())
    assert {"dpsr_serving", "numpy"} <= loaded
    assert not loaded & {"tensorflow", "tensorflow_serving", "faiss", "dpsr_tf", "dpsr_export", "dpsr_tokenizer"}


# dpsr query


def query(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command("query", *arguments, **environment)


@pytest.fixture(scope="module")
def titles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A servable version directory with titles."""
    version = tmp_path_factory.mktemp("titled") / "1"
    (version / "assets.extra").mkdir(parents=True)
    with gzip.open(version / "assets.extra" / "item_titles.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("99\tother\n100\tRed shoes, café\n101\tbell\x07 and\u2028line\n")
    return version


def test_query_prints_a_table(servers: dict[str, ModelServer], titles: Path) -> None:
    result = query(f"--target={servers['shop'].target}", "--model=shop", f"--titles={titles}", "ab", "")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        "ab",
        "  rank    score  head  item id  title",
        "     1   1.0000     0      100  Red shoes, café",
        "     2   0.5000     1      101  bell� and�line",
        "",
        "",
        "  no results",
        "",
    ]


def test_query_prints_json(servers: dict[str, ModelServer], titles: Path) -> None:
    file = titles / "assets.extra" / "item_titles.tsv.gz"
    result = query(
        f"--target={servers['keyed'].target}", "--model=keyed", "--k=1", "--json", f"--titles={file}", "é", ""
    )
    assert result.returncode == 0
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["query"] == "é"
    assert first["results"] == [{"rank": 1, "score": 1.0, "item_id": 200, "head": 0, "item_key": "sku-200"}]
    assert second == {"query": "", "results": [], "version": 1}


def test_query_that_is_not_utf8(servers: dict[str, ModelServer]) -> None:
    result = query(f"--target={servers['shop'].target}", "--model=shop", "--json", "--", "-a\udcff")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "dpsr query: error: the query b'-a\\xff' is not UTF-8 text; convert it to UTF-8\n"


def test_query_failures_are_one_line(
    servers: dict[str, ModelServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"--target={servers['shop'].target}"
    broken = tmp_path / "broken.tsv.gz"
    broken.write_bytes(b"not gzip")
    untabbed = tmp_path / "untabbed.tsv.gz"
    untabbed.write_bytes(gzip.compress(b"100 title\n"))
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(gzip.compress(b"100\ttitle\n" * 1000)[:-12])
    damaged = tmp_path / "damaged.tsv.gz"
    damaged.write_bytes(gzip.compress(b"100\ttitle\n")[:10] + b"\xff" * 20)
    for status, arguments, words in (
        (1, (target, "--model=shop", f"--titles={damaged}", "a"), "cannot read titles"),
        (2, (target,), "nothing to search for"),
        (2, (target, "--model=", "a"), "must not be empty"),
        (2, ("--target=127.0.0.1", "--model=shop", "a"), "--target=127.0.0.1: has no port; expected host:port"),
        (2, (target, "--k=0", "a"), "k=0"),
        (2, (target, "--kk=1", "a"), "kk"),
        (2, (target, "--model=shop", "--user_features={", "a"), "JSON object such as"),
        (2, (target, "--model=shop", "--user_features=[1]", "a"), "got [1], expected a JSON object"),
        (2, (target, "--model=shop", "--metadata=x", "a"), "expected KEY=VALUE"),
        (2, (target, "--model=shop", "--k=1", '--user_features={"age": 3}', "a"), "those it reads: none"),
        (
            2,
            (target, "--model=shop", "--k=1", "--include=brand=Acme", "a"),
            "takes no include; its inputs are k, query",
        ),
        (1, (target, "--model=shop", "--ca=missing.pem", "a"), "missing.pem: No such file"),
        (2, (target, "--model=shop", "--certificate=missing.pem", "a"), "--certificate and --key need each other"),
        (
            2,
            (target, "--model=shop", "--ca=missing.pem", "--key=missing.pem", "a"),
            "--certificate and --key need each other",
        ),
        (1, (target, "--model=nowhere", "a"), "does not serve a model 'nowhere'"),
        (1, ("--target=127.0.0.1:1", "--model=shop", "a"), "127.0.0.1:1"),
        (1, (target, "--model=shop", f"--titles={tmp_path / 'missing'}", "a"), "no such file"),
        (1, (target, "--model=shop", f"--titles={tmp_path}", "a"), "item_titles.tsv.gz: no such file"),
        (1, (target, "--model=shop", f"--titles={broken}", "a"), "cannot read titles"),
        (1, (target, "--model=shop", f"--titles={untabbed}", "a"), "line 1: expected item_id<TAB>title"),
        (1, (target, "--model=shop", f"--titles={cut}", "a"), "cannot read titles"),
    ):
        assert main(["query", *arguments]) == status, arguments
        said = capsys.readouterr().err
        assert said.startswith("dpsr query: error: ") and said.count("\n") == 1 and words in said, said


def test_query_help() -> None:
    result = query("--help")
    assert result.returncode == 0 and "--titles" in result.stdout and result.stderr == ""
