"""Under Hugging Face's Trainer: it trains, evaluates on the averaged weights, and resumes bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from optim import ProdigyPlusScheduleFree, flatten_state

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

STEPS = 6


class Sentences(Dataset[dict[str, Tensor]]):
    """A few sentences of 8 tokens that count up."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) + index) % 32
        return {"input_ids": ids, "labels": ids}


def build_model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(1.0 + torch.zeros_like(p) if p.dim() == 1 else 0.1 * torch.randn(p.shape, generator=generator))
    return model


def build(folder: Path, **arguments: Any) -> Any:
    """A Trainer over our optimizer, two groups, with the model and the lr as they are at the start."""
    model = build_model()
    params = list(model.parameters())
    groups = [{"params": params[:1], "name": "embedding"}, {"params": params[1:], "name": "rest"}]
    optimizer = ProdigyPlusScheduleFree(groups, d0=1e-3)
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    chosen = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",  # a LambdaLR of ones; Trainer's default falls to 0
        **{**settings, **arguments},
    )
    data = Sentences()
    return transformers.Trainer(
        model=model, args=chosen, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None)
    )


def inner(trainer: Any) -> ProdigyPlusScheduleFree:
    """Ours, out of accelerate's wrapper."""
    optimizer: ProdigyPlusScheduleFree = trainer.optimizer.optimizer
    return optimizer


def at_y(trainer: Any) -> dict[str, Tensor]:
    """Everything that training goes on from: y and the whole state."""
    inner(trainer).train()
    tensors, _ = flatten_state(inner(trainer).state_dict())
    return tensors | {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run without evaluation and checkpoints, to compare the others with."""
    trainer = build(tmp_path_factory.mktemp("undisturbed"))
    trainer.train()
    return trainer


def test_the_loss_falls_under_trainer_and_its_clipping(undisturbed: Any) -> None:
    losses = [entry["loss"] for entry in undisturbed.state.log_history if "loss" in entry]
    assert undisturbed.args.max_grad_norm == 1.0, "Trainer's own default"
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert [m.k for m in inner(undisturbed).metrics()] == [STEPS + 1] * 2


def test_evaluation_sees_the_average_and_does_not_change_the_training(undisturbed: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_strategy="steps", eval_steps=1)
    optimizer: ProdigyPlusScheduleFree = trainer.optimizer
    modes: list[tuple[bool, bool]] = []

    def look(module: nn.Module, _: object) -> None:
        modes.append((module.training, optimizer.holds_average))
        if not module.training:
            for p in module.parameters():
                y, z = optimizer_state(optimizer, p)
                torch.testing.assert_close(p.detach(), y + (1 - 1 / 0.9) * (z - y), rtol=1e-5, atol=1e-7)

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    assert {mode for mode in modes if mode[0]} == {(True, False)}
    assert {mode for mode in modes if not mode[0]} == {(False, True)}
    assert optimizer.holds_average, "Trainer leaves the averaged weights in the model after its last evaluation"
    assert_same(at_y(trainer), at_y(undisturbed))


def optimizer_state(optimizer: ProdigyPlusScheduleFree, p: Tensor) -> tuple[Tensor, Tensor]:
    params = [q for group in optimizer.param_groups for q in group["params"]]
    state = optimizer.state_dict()["state"][next(index for index, q in enumerate(params) if q is p)]
    return state["y"], state["z"]


@pytest.mark.parametrize("evaluates", [False, True], ids=["saved at y", "saved while x is lent"])
def test_a_run_resumed_from_a_checkpoint_of_trainer_is_uninterrupted(
    evaluates: bool, undisturbed: Any, tmp_path: Path
) -> None:
    looking = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
    first = build(tmp_path, save_strategy="steps", save_steps=3, **looking)
    first.train()
    assert_same(at_y(first), at_y(undisturbed))
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [m.k for m in inner(resumed).metrics()] == [STEPS + 1] * 2
    assert_same(at_y(resumed), at_y(undisturbed))
