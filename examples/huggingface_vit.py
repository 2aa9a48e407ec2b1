"""A Hugging Face ViT from its config, trained by the Trainer."""

import argparse
import tempfile

import torch
from torch.utils.data import StackDataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import tdlrt
from digits import load_digits
from tdlrt.integrations.transformers import TDLRTCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=8)
epochs = parser.parse_args().epochs

set_seed(0)
images, labels, test_images, test_labels = load_digits()
train = StackDataset(pixel_values=images, labels=labels)
test = StackDataset(pixel_values=test_images, labels=test_labels)

config = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_labels=10,
    initializer_range=0.1,  # the default of 0.02 is for wider networks
)
model = ViTForImageClassification(config)
# The forward pass of ViT reads the weight of its patch embedding, so that one stays dense.
tdlrt.factorize_(model, rank=0.5, init_scale=None, exclude="*patch_embeddings*")
print("before", tdlrt.summary(model), sep="\n")

optimizer = tdlrt.TDLRT(model, torch.optim.AdamW, lr=8e-3, rank_policy=tdlrt.ParameterBudget(0.3))

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            max_grad_norm=0.0,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        optimizers=(optimizer, None),  # Trainer makes its own scheduler: a line down to 0
    )
    trainer.add_callback(TDLRTCallback(trainer, freeze_at_share=0.5))
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]

print("after", tdlrt.summary(model), sep="\n")
print(f"test accuracy {accuracy:.1%}")
