"""What is said when a GPU's memory is full, and copies that are copies."""

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.training.memory import copy_to_device, copy_to_host
from cognica_poe.training.trainer import Trainer
from tests.runs import small_recipe, write_texts


@pytest.mark.parametrize(
    ("micro_rows", "advice"), [(2, "micro-rows below 2 or --training.recompute"), (1, "recompute")]
)
def test_a_full_gpu_ends_a_run_with_one_line(tmp_path, micro_rows, advice):
    recipe, run = small_recipe(write_texts(tmp_path / "texts"), micro_rows=micro_rows), tmp_path / "run"
    pipeline.prepare(recipe, run, lambda line: None)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe))
    trainer.start()

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")

    trainer.objective.backward = full
    with pytest.raises(UserError, match=f"the memory of the GPU is full: train with .*{advice}") as caught:
        trainer.train()
    assert "\n" not in str(caught.value) and ("below" in str(caught.value)) == (micro_rows > 1)


def test_copies_on_a_processor_are_complete():
    tensor = torch.arange(6).view(2, 3)
    host = copy_to_host(tensor)
    assert torch.equal(host, tensor) and host.data_ptr() != tensor.data_ptr()
    assert torch.equal(copy_to_device(tensor, torch.device("cpu")), tensor)
