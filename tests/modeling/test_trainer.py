"""transformers' ``Trainer`` on the model: evaluation as well as training steps."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.conftest import make_model


def test_evaluation_and_prediction(tmp_path):
    pytest.importorskip("accelerate")
    model = make_model(dtype=torch.float32)
    ids = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=rows)
    with torch.no_grad():
        expected = model(ids, labels=ids)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    predicted = trainer.predict(rows).predictions  # the cache is no prediction
    torch.testing.assert_close(torch.from_numpy(predicted), expected.logits)
