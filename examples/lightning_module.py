"""A Lightning module with automatic optimisation."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdlrt
from digits import load_digits
from tdlrt.integrations.lightning import TDLRTCallback


class Classifier(LightningModule):
    """A small network in Tucker format."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        tdlrt.factorize_(self.network, rank=0.5)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        """Accuracy."""
        images, labels = batch
        hits = (self.network(images).argmax(1) == labels).float()
        self.log("accuracy", hits.mean())

    def configure_optimizers(self) -> dict[str, object]:
        """TDLRT in the place of an optimiser; any scheduler goes with it."""
        optimizer = tdlrt.TDLRT(
            self, torch.optim.Adam, lr=2e-3, rank_policy=tdlrt.ParameterBudget(0.15)
        )
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=8)
epochs = parser.parse_args().epochs

seed_everything(0)
images, labels, test_images, test_labels = load_digits()
train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(test_images, test_labels), batch_size=360)

module = Classifier()
print("before", tdlrt.summary(module), sep="\n")
trainer = Trainer(
    max_epochs=epochs,
    callbacks=[TDLRTCallback(max_grad_norm=1.0, freeze_at_share=0.5)],
    logger=False,  # TensorBoard, CSV, ...: the callback sends tdlrt.metrics to all of them
    enable_checkpointing=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)
trainer.fit(module, train)
accuracy = trainer.test(module, test, verbose=False)[0]["accuracy"]
print("after", tdlrt.summary(module), sep="\n")
print(f"test accuracy {accuracy:.1%}")
