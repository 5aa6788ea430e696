from __future__ import annotations

import pytest

import deepserve
from engine.config import SERVER_WIDE, Config, Speculation, field_help, parse_size, resolve, several
from engine.types import SamplingParams, UserError, checked, pack_ids, unpack_ids


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "deepserve.toml"
    file.write_text('port = 9000\nmax-num-seqs = 8\nkv-cache-memory-bytes = "1.5G"\nserved-model-name = "a"\n')
    config, origin = resolve({"port": "9001"}, file)
    assert (config.port, config.max_num_seqs, config.kv_cache_memory_bytes, config.served_model_name) == (9001, 8, 3 << 29, ["a"])
    assert origin["port"] == "flag --port" and origin["max_num_seqs"] == f"file {file}" and origin["te"] == "default"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": "99999"}, "port"),
        ({"port": "x"}, "port"),
        ({"te": "0"}, "te"),
        ({"dtype": "int3"}, "dtype"),
        ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype"),
        ({"kv_cache_memory_bytes": "lots"}, "4G or 512M"),
        ({"nonsense": "1"}, "no setting 'nonsense'"),
    ],
)
def test_a_wrong_value_is_named(flags, says):
    with pytest.raises(UserError, match=says):
        resolve(flags)


def test_speculation_is_read_from_json_and_from_a_table(tmp_path):
    flag = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'
    want = Speculation(num_speculative_tokens=5, prompt_lookup_max=3, prompt_lookup_min=1)
    assert resolve({"speculative_config": flag})[0].speculative_config == want
    (tmp_path / "a.toml").write_text(
        "[speculative-config]\nnum_speculative_tokens = 5\nprompt_lookup_max = 3\nprompt_lookup_min = 1"
    )
    assert resolve({}, tmp_path / "a.toml")[0].speculative_config == want
    assert resolve({})[0].speculative_config is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("ngram", "not JSON"),
        ("[]", "object"),
        ('{"method": "eagle"}', "'eagle' isn't there; the only one is \"ngram\""),
        ('{"num_speculative_tokens": 0}', "num_speculative_tokens"),
        ('{"prompt_lookup_max": 1}', "prompt_lookup_min = 2 is more than prompt_lookup_max = 1"),
        ('{"draft_model": "x"}', "draft_model"),
    ],
)
def test_a_wrong_speculation_is_named(value, says):
    with pytest.raises(UserError, match=says) as caught:
        resolve({"speculative_config": value})
    assert caught.value.param == "speculative_config"


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        resolve({}, tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("port = = 1")
    with pytest.raises(UserError, match="not TOML"):
        resolve({}, tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("prot = 1")
    with pytest.raises(UserError, match="no setting 'prot'"):
        resolve({}, tmp_path / "bad.toml")


# ---- several models -------------------------------------------------------------------------------------------------------


def listed(*args, **kwargs) -> list[str]:
    return [config.model for config, _ in several(*args, **kwargs)]


def test_models_named_on_the_command_line(tmp_path):
    assert listed({}) == [Config().model]
    assert listed({"model": "a"}) == listed({}, ["a"]) == ["a"]
    made = several({"te": "2", "port": "9001"}, ["a", "b"])
    assert [(c.model, c.te, c.port, o["model"], o["te"]) for c, o in made] == [
        ("a", 2, 9001, "command line", "flag --te"),
        ("b", 2, 9001, "command line", "flag --te"),
    ]


def test_models_of_a_file(tmp_path):
    file = tmp_path / "deepserve.toml"
    file.write_text(
        """
        max-num-seqs = 8
        te = 2
        [models.small]
        model = "/models/s.gguf"
        max-num-seqs = 16
        [models."org/b"]
        served-model-name = ["b", "bee"]
        keep-alive = 60
        """
    )
    (small, origin), (b, _) = several({"te": 3}, file=file)
    assert (small.model, small.served_model_name, small.max_num_seqs, small.te) == ("/models/s.gguf", ["small"], 16, 3)
    assert origin["max_num_seqs"] == f"file {file} [models.small]" and origin["te"] == "flag --te"
    assert (b.model, b.served_model_name, b.max_num_seqs, b.keep_alive) == ("org/b", ["b", "bee"], 8, 60.0)
    # Named on the command line, only those are served, each with its table where it has one.
    assert [c.served_model_name for c, _ in several({}, ["c", "small"], file)] == [[], ["small"]]
    assert listed({"model": "small"}, file=file) == ["/models/s.gguf"]
    # The file's own `model` is the default model, table or not.
    file.write_text('model = "z"\n[models.a]\n')
    assert listed({}, file=file) == ["z", "a"]
    file.write_text('model = "z"\n[models.a]\n[models.z]\nte = 4\n')
    assert [(c.model, c.te) for c, _ in several({}, file=file)] == [("z", 4), ("a", 1)]


@pytest.mark.parametrize("field", SERVER_WIDE)
def test_a_models_table_has_no_settings_of_the_server(tmp_path, field):
    file = tmp_path / "deepserve.toml"
    said = field.replace("_", "-")
    file.write_text(f'[models.a]\n{said} = "1"')
    with pytest.raises(UserError, match=rf"\[models.a\]: {said} is for the whole server") as caught:
        several({}, file=file)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("flags", "models", "text", "says"),
    [
        ({}, ["a", "b", "a"], "", "a is named twice"),
        ({"model": "a"}, ["b"], "", "leave out --model"),
        ({"served_model_name": "x"}, ["a", "b"], "", "command line: served-model-name can't be the name of all: a, b"),
        ({}, ["a", "b"], 'served-model-name = "x"', r"deepserve.toml: served-model-name can't"),
        ({}, [], 'models = ["a", "b"]', r"for example \[models.smollm2-135m-instruct\]"),
        ({}, [], "[models.a]\nspeed = 1", r"\[models.a\]: there is no setting 'speed'"),
        ({}, [], "[models.a]\nte = 0", r"\[models.a\]: te = 0"),
        ({"pd": "1p1d"}, [], "[models.a]\nte = 2", "leave out --te 2"),
    ],
)
def test_models_that_contradict_each_other(tmp_path, flags, models, text, says):
    file = tmp_path / "deepserve.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        several(flags, models, file)


def test_every_field_has_a_meaning():
    for name in Config.__struct_fields__:
        assert field_help(name), name


def test_sizes():
    assert [parse_size(t) for t in ("7", "2k", "4G", "512MiB", "1.5gb")] == [7, 2048, 4 << 30, 512 << 20, 3 << 29]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"n": 0},
        {"n": 129},
        {"seed": "x"},
        {"stop": [3]},
        {"logit_bias": {1: 101.0}},
        {"logprobs": 99},
    ],
)
def test_sampling_parameters_are_checked(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        checked(SamplingParams(**wrong))


def test_sampling_parameters_that_contradict_each_other():
    with pytest.raises(ValueError, match="min_tokens=9 is more than max_tokens=3"):
        SamplingParams(min_tokens=9, max_tokens=3)
    with pytest.raises(ValueError, match="empty string"):
        SamplingParams(stop=[""])
    assert SamplingParams(stop="x").stop == ["x"]  # type: ignore[arg-type]
    assert checked(SamplingParams(logit_bias={5: 1.0}, seed=-3)).logit_bias == {5: 1.0}


def test_ids_survive_the_wire():
    ids = [0, 1, 49151, 2**31 - 1]
    assert list(unpack_ids(pack_ids(ids))) == ids and len(pack_ids(ids)) == 16


@pytest.mark.parametrize(
    ("words", "models"),
    [
        ([], [Config().model]),
        (["a"], ["a"]),
        (["--te", "2", "a", "b"], ["a", "b"]),
        (["a", "b", "--scale-without", "fork", "dram"], ["a", "b"]),
        (["--model", "a"], ["a"]),
    ],
)
def test_the_command_line_names_models(words, models):
    configs, origins = deepserve.configs_of(deepserve.parser().parse_args(["serve", *words]))
    assert [config.model for config in configs] == models and len(origins) == len(models)
    assert all(config.scale_without == (["fork", "dram"] if "fork" in words else []) for config in configs)
