"""Golden vectors of the reference implementation, discovered by their meta.json.

The folder comes from MOSHI_GOLDENS, else tests/goldens. A case says its kind and settings in
meta.json and config.json; everything recorded in outputs.safetensors is compared, tokens exactly.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moshi_cli.core.conditioning import Value
from moshi_cli.core.config import MimiConfig, ModelConfig, Sampling
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.sampling import GREEDY
from moshi_cli.core.script import Entry, Script, ScriptState
from moshi_cli.core.stepper import Step, Stepper, StepState
from moshi_cli.core.streams import DelayPattern, Role, Task
from moshi_cli.core.weights import load_lm, load_mimi

ROOT = Path(os.environ.get("MOSHI_GOLDENS") or Path(__file__).parent / "goldens")
CASES = sorted(path.parent.name for path in ROOT.glob("*/meta.json"))
LOGITS, SOUND = 2e-4, 5e-5  # absolute tolerances: logits; latents and waveforms
SPEAKERS = 5  # voices that a TTS has room for


@dataclass
class Case:
    """One folder of golden vectors."""

    folder: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "outputs.safetensors")

    @property
    def files(self) -> list[Path]:
        """The same weights in one or more layouts."""
        return sorted(self.folder.glob("model*.safetensors"))

    @cached_property
    def model(self) -> ModelConfig:
        return ModelConfig.from_kyutai(self.config)

    def lm(self, file: Path | None = None, dtype: torch.dtype = torch.float32) -> MoshiLm:
        assert self.model.lm is not None
        kind = self.model.kind
        return load_lm(file or self.files[0], self.model.lm, kind=kind, dtype=dtype)

    def mimi(self, file: Path | None = None) -> Mimi:
        mimi = load_mimi(file or self.files[0], MimiConfig.from_kyutai(self.config))
        mimi.set_num_codebooks(self.meta["num_codebooks"])
        return mimi

    def pattern(self) -> DelayPattern:
        """Dual stream or STT as the reference sees it: no lag of the task's own."""
        lm = self.model.lm
        assert lm is not None
        voice = Role.SAMPLED if lm.dep_q else Role.GIVEN
        partner = Role.GIVEN if lm.partner_q else Role.ABSENT
        return DelayPattern.of(Task("raw", Role.SAMPLED, voice, partner), lm)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def kinds(*wanted: str) -> Any:
    """Parametrise over the cases of some kinds."""
    cases = [Case(ROOT / name) for name in CASES]
    found = [pytest.param(c, id=c.folder.name) for c in cases if c.meta["kind"] in wanted]
    return pytest.mark.parametrize("case", found or [pytest.param(None, marks=pytest.mark.skip)])


def close(got: Tensor, want: Tensor, atol: float) -> None:
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.nan_to_num(), want.nan_to_num(), atol=atol, rtol=0)


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert torch.equal(got.long(), want.long()), f"{(got != want).sum()} of {want.numel()} differ"


def test_kinds_are_known() -> None:
    assert {Case(ROOT / name).meta["kind"] for name in CASES} <= {"mimi", "lm", "cond_lm", "tts"}


# Mimi ------------------------------------------------------------------------------------------


@kinds("mimi")
def test_mimi_offline(case: Case) -> None:
    out, wav = case.outputs, case.inputs["wav"]
    for file in case.files:
        mimi = case.mimi(file)
        latent = mimi.encode_latent(wav)
        close(latent, out["offline_latent"], SOUND)
        same(mimi.quantizer.encode(latent), out["offline_codes"])
        quantized = mimi.quantizer.decode(out["offline_codes"])
        close(quantized, out["offline_quantized_latent"], SOUND)
        close(mimi.decode(out["offline_codes"]), out["offline_wav"], SOUND)
        same(mimi.encode(wav[..., : -case.meta["ragged_cut"]]), out["offline_codes_ragged"])


@kinds("mimi")
def test_mimi_few_codebooks(case: Case) -> None:
    mimi, count = case.mimi(), case.meta["few_codebooks"]
    mimi.set_num_codebooks(count)
    same(mimi.encode(case.inputs["wav"]), case.outputs["few_codes"])
    few = mimi.decode(case.outputs["offline_codes"][:, :count])
    close(few, case.outputs["few_wav"], SOUND)


@kinds("mimi")
@pytest.mark.parametrize("name", ["stream", "chunked"])
def test_mimi_streaming(case: Case, name: str) -> None:
    """The reference's ring of exactly `context` cells, frame by frame and in longer calls."""
    mimi, out, wav = case.mimi(), case.outputs, case.inputs["wav"]
    frames = 1 if name == "stream" else case.meta["chunk_frames"]
    state = mimi.init_state(len(wav), exact_window=False)
    size = frames * mimi.frame_samples
    latent = torch.cat([mimi.encode_latent(x, state.encoder) for x in wav.split(size, -1)], -1)
    close(latent, out[f"{name}_latent"], SOUND)
    same(mimi.quantizer.encode(latent), out[f"{name}_codes"])
    codes = out["offline_codes"].split(frames, -1)
    sound = torch.cat([mimi.decode(c, state.decoder) for c in codes], -1)
    close(sound, out[f"{name}_wav"], SOUND)


@kinds("mimi")
def test_mimi_masked(case: Case) -> None:
    if "masked_codes" not in case.outputs:
        pytest.skip("no mask in this case")
    mimi, out, wav = case.mimi(), case.outputs, case.inputs["wav"]
    masks, resets = case.inputs["exec_mask"].bool(), case.inputs["reset"].bool()
    state = mimi.init_state(len(wav), exact_window=False)
    for s, (active, reset) in enumerate(zip(masks, resets, strict=True)):
        state.reset(reset)
        samples = slice(s * mimi.frame_samples, (s + 1) * mimi.frame_samples)
        codes = mimi.encode(wav[..., samples], state.encoder, active)
        same(codes[active], out["masked_codes"][active, :, s : s + 1])
        sound = mimi.decode(out["offline_codes"][..., s : s + 1], state.decoder, active)
        close(sound[active], out["masked_wav"][active][..., samples], SOUND)


# Language models -------------------------------------------------------------------------------


def conditioned(case: Case, lm: MoshiLm) -> Any:
    """Conditions of the forward pass, checked against the recorded ones."""
    if case.meta["kind"] != "cond_lm":
        return None
    (name,) = (c.name for c in lm.config.conditions)
    words, out = case.meta["descriptions"], case.outputs
    values: list[dict[str, Value]] = [{name: word} for word in words]
    close(lm.conditioning.encode(values)[name], out[f"condition_{name}"], SOUND)
    close(lm.condition(values).sum, out["condition_sum"], SOUND)
    dropped = lm.condition([*values[:-1], {name: None}]).sum
    close(dropped, out["condition_dropped_sum"], SOUND)
    return lm.condition(values)


def forward(case: Case, lm: MoshiLm) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """h, text logits and audio logits back in undelayed time as the reference gives them: NaN past
    the end of a delayed stream; and the mask of all streams. Text alone stays as it is."""
    codes, delays = case.inputs["codes"], lm.config.delays
    T, Q = codes.shape[-1], lm.config.dep_q
    shifted = case.pattern().shift(codes, steps=T)
    columns = torch.cat([shifted.inputs, shifted.targets[..., -1:]], -1)
    same(columns, case.outputs["forward_delayed_codes"])
    h, text = lm.temporal(shifted.inputs, conditions=conditioned(case, lm))

    def undelay(x: Tensor, k: int, fill: float) -> Tensor:  # [B, T, ...]
        end = torch.full_like(x[:, : delays[k]], fill)
        return torch.cat([x[:, delays[k] :], end], 1)

    masks = [undelay(shifted.mask[:, k], k, False) for k in range(1 + Q)]
    audio = None
    if Q:
        logits = lm.depth_logits(h, shifted.targets)
        audio = torch.stack([undelay(logits[:, k], 1 + k, torch.nan) for k in range(Q)], 1)
    text = undelay(text, 0, torch.nan) if Q else text
    return h, text[:, None], audio, torch.stack(masks, 1)


@kinds("lm", "cond_lm")
def test_forward(case: Case) -> None:
    for file in case.files:
        h, text, audio, mask = forward(case, case.lm(file))
        out = case.outputs
        close(h, out["forward_transformer_out"], LOGITS)
        close(text, out["forward_text_logits"], LOGITS)
        if "forward_text_mask" in out:
            same(mask[:, :1], out["forward_text_mask"])
        if audio is not None:
            close(audio, out["forward_logits"], LOGITS)
            same(mask[:, 1:], out["forward_mask"])


@kinds("lm", "cond_lm")
def test_forward_bf16(case: Case) -> None:
    """bfloat16 is as far from float32 as the reference's is."""
    if "forward_bf16_text_logits" not in case.outputs:
        pytest.skip("not recorded")
    h, text, audio, _ = forward(case, case.lm(dtype=torch.bfloat16))
    for name, value in {"transformer_out": h, "text_logits": text, "logits": audio}.items():
        if value is None:
            continue
        close(value.float(), case.outputs[f"forward_bf16_{name}"], 0.5)
        error = (value.float() - case.outputs[f"forward_{name}"]).nan_to_num().abs().max()
        assert error <= 2 * case.meta["info"]["bf16_vs_f32"][f"forward_{name}"]


def check_trace(case: Case, stepper: Stepper, state: StepState, prefix: str) -> None:
    """One `step` per frame against the reference's generator: logits, tokens, re-aligned output."""
    out, config = case.outputs, stepper.lm.config
    user = case.inputs["user"][..., : len(case.inputs["user"][0, 0])]
    steps, slots = user.shape[-1], len(state.seed)
    stepper.latency = max(config.delays)  # the reference waits for the user's rows as well
    everyone = torch.ones(steps, slots, dtype=torch.bool)
    masks = case.inputs.get("exec_mask", everyone).bool()
    resets = case.inputs.get("reset", ~everyone).bool()
    for s in range(steps):
        state.reset(resets[s])
        on = masks[s]
        step = stepper.step(state, user[:slots, : len(stepper.pattern.given), s], on)
        close(step.text_logits[on], out[f"{prefix}_text_logits"][s][on], LOGITS)
        same(step.text[on], out[f"{prefix}_text_tokens"][s][on])
        if config.dep_q:
            assert step.audio_logits is not None
            close(step.audio_logits[on], out[f"{prefix}_audio_logits"][s][on], LOGITS)
            same(step.codes[on], out[f"{prefix}_audio_tokens"][s][on])
        if f"{prefix}_extra_heads" in out:
            heads = stepper.lm.extra_probabilities(step.h[:, None])[:, 0]
            close(heads[on], out[f"{prefix}_extra_heads"][s][on], LOGITS)
        want = out[f"{prefix}_step_out"][s]
        same(step.ready, (want >= -1).all(-1))
        same(step.frame[step.ready], want[step.ready])
        if "exec_mask" not in case.inputs:
            assert bool(out[f"{prefix}_step_is_none"][s]) == (not step.ready.any())


@kinds("lm", "cond_lm")
def test_trace(case: Case) -> None:
    lm = case.lm()
    stepper = Stepper(lm, case.pattern(), GREEDY)
    state = stepper.init_state(len(case.inputs["user"]))
    if case.meta["kind"] == "cond_lm":
        (name,) = (c.name for c in lm.config.conditions)
        words = case.meta["descriptions"][:1] * len(state.seed)
        state.conditions = lm.condition([{name: word} for word in words])
    check_trace(case, stepper, state, "trace")


@kinds("cond_lm")
def test_guided_trace(case: Case) -> None:
    lm = case.lm()
    sampling = replace(GREEDY, guidance=case.meta["cfg_coef"])
    stepper = Stepper(lm, case.pattern(), sampling)
    state = stepper.init_state(len(case.inputs["user"]))
    (name,) = (c.name for c in lm.config.conditions)
    real, null = case.meta["descriptions"][0], case.meta["cfg_null"]
    slots = len(state.seed)
    state.conditions = lm.condition([{name: real}] * slots + [{name: null}] * slots)
    check_trace(case, stepper, state, "cfg_trace")


# Speech synthesis ------------------------------------------------------------------------------


def voices(case: Case, names: list[str], width: int) -> Tensor:
    """Voice files side by side, [SPEAKERS · T, width], NaN where there is no speaker."""
    files = [load_file(case.folder / name)["speaker_wavs"][0].T for name in names]  # [T, width]
    missing = torch.full_like(files[0], torch.nan)
    return torch.cat(files + [missing] * (SPEAKERS - len(files)))


def tts_conditions(case: Case, run: dict[str, Any], lm: MoshiLm, guided: bool) -> Any:
    """Conditions of a run, those of the null half last if guided; checked against the recorded."""
    known = {c.name: c for c in lm.config.conditions}
    values: list[dict[str, Value]] = [{} for _ in run["entries"]]
    for b, value in enumerate(values):
        if "control" in known:
            value["control"] = "ok"
        if "cfg" in known and run.get("cfg_condition") is not None:
            value["cfg"] = str(run["cfg_condition"])
        if "speaker_wavs" in known and run.get("voices"):
            value["speaker_wavs"] = voices(case, run["voices"][b], known["speaker_wavs"].dim)
    for value in values[: len(values) * guided]:
        told = value.get("speaker_wavs")  # nothing is told, for as long
        nothing = torch.full_like(told, torch.nan) if isinstance(told, Tensor) else None
        values.append({"speaker_wavs": nothing} if nothing is not None else {})
    encoded = lm.conditioning.encode(values)
    total, source = lm.conditioning.fuse(encoded)
    for name, got in {**encoded, "sum": total, "cross": source}.items():
        want = case.outputs.get(f"{run['name']}_condition_{name}")
        if got is not None and want is not None:
            close(got[: len(want)], want, SOUND)
    return lm.condition(values)


def tts_run(case: Case, run: dict[str, Any], lm: MoshiLm) -> tuple[list[Step], StepState]:
    """Generate as many steps as were recorded, greedily."""
    meta, name, (lag,) = case.meta, run["name"], case.model.lags.values()
    task = Task("tts", Role.STEERED, Role.SAMPLED, lag_s=lag)
    pattern = DelayPattern.of(task, lm.config, codebooks=run["n_q"])
    script = Script(
        lm.config.text_vocab + 1,
        ahead=case.model.ahead,
        max_padding=meta["max_padding"],
        initial_padding=meta["initial_padding"],
    )
    scale, prefixed = run.get("cfg_coef", 1.0), bool(run.get("prefix"))
    sampling = Sampling(
        temp=0, text_temp=0, guidance=scale, guide_text=scale == 1.0,
        pad_bonus=run.get("padding_bonus", 0.0),
    )  # fmt: skip
    stepper = Stepper(lm, pattern, sampling, steer=script, hide_prompt=prefixed)
    prompts = [case.inputs.get(f"{name}_prefix_{b}") for b in range(len(run["entries"]))]
    longest = max((p.shape[1] for p in prompts if p is not None), default=0)
    state = stepper.init_state(len(run["entries"]), prompt_frames=longest)
    if lm.config.conditions:
        state.conditions = tts_conditions(case, run, lm, sampling.guided)
    for b, entries in enumerate(run["entries"]):
        assert state.steer is not None
        script.load(state.steer, b, [Entry(tuple(e["tokens"]), e["padding"]) for e in entries])
        if prompts[b] is not None:
            assert state.prompt is not None
            state.prompt.load(b, prompts[b], pattern, task.lag_frames)
    on = torch.ones(len(run["entries"]), dtype=torch.bool)
    steps = len(case.outputs[f"{name}_text_logits"])
    return [stepper.step(state, None, on) for _ in range(steps)], state


@kinds("tts")
def test_tts(case: Case) -> None:
    lm = case.lm()
    for run in case.meta["runs"]:
        name, (lag,) = run["name"], case.model.lags.values()
        steps, state = tts_run(case, run, lm)
        info, lag_frames = (
            case.meta["info"]["runs"][name],
            -Task("", *[Role.GIVEN] * 2, lag_s=lag).lag_frames,
        )
        out = {k.removeprefix(name + "_"): v for k, v in case.outputs.items()}
        close(torch.stack([s.text_logits for s in steps]), out["text_logits"], LOGITS)
        logits = [s.audio_logits for s in steps[lag_frames:] if s.audio_logits is not None]
        close(torch.stack(logits), out["audio_logits"], LOGITS)
        logged = torch.stack([torch.stack([s.sampled, s.text], -1) for s in steps], 1)
        same(logged, out["logged_text_tokens"])
        frames = torch.stack([s.frame for s in steps if s.ready.all()])
        count = len(frames)
        same(frames[..., 0], out["frames"][:count, :, 0])
        same(frames[..., 1:], out["frames"][lag_frames : lag_frames + count, :, 1:])
        assert len(out["frames"]) == lag_frames + count
        assert isinstance(state.steer, ScriptState)
        assert state.steer.ended.tolist() == info["end_steps"]
        for begun, times in zip(state.steer.begun.tolist(), info["consumption_times"], strict=True):
            assert [step for step in begun if step >= 0] == times
