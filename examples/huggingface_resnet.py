"""A Hugging Face ResNet from its config, trained by the Trainer."""

import argparse
import tempfile

import torch
from torch.utils.data import StackDataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

import tdlrt
from digits import load_digits
from tdlrt.integrations.transformers import TDLRTCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=6)
epochs = parser.parse_args().epochs

set_seed(0)
images, labels, test_images, test_labels = load_digits()
train = StackDataset(pixel_values=images, labels=labels)
test = StackDataset(pixel_values=test_images, labels=test_labels)

config = ResNetConfig(
    num_channels=1,
    embedding_size=32,
    hidden_sizes=[32, 64],
    depths=[1, 1],
    layer_type="basic",
    num_labels=10,
)
model = ResNetForImageClassification(config)
tdlrt.factorize_(model, rank=0.5)
print("before", tdlrt.summary(model), sep="\n")

steps = epochs * -(-len(train) // 32)
optimizer = tdlrt.TDLRT(model, torch.optim.AdamW, lr=3e-3, rank_policy=tdlrt.ParameterBudget(0.1))
scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            max_grad_norm=0.0,  # the callback clips, by the norm of the projected gradient
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        optimizers=(optimizer, scheduler),
    )
    trainer.add_callback(TDLRTCallback(trainer, max_grad_norm=1.0, freeze_at_share=0.5))
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]

print("after", tdlrt.summary(model), sep="\n")
print(f"test accuracy {accuracy:.1%}")
