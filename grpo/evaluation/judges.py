"""Networks that look at images: features for distances, probabilities for classes."""

import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from grpo.config import Evaluation, UserError, import_extra
from grpo.formats import require_finite
from grpo.models import Classifier, load_classifier, normalize, read_weights
from grpo.shapes import Reader, load_reader

SPATIAL_CHANNELS = 7


class Judge(Protocol):
    """Looks at images as they are stored: [B, 3, H, W] uint8 -> (features [B, D] fp32, logits [B, K] fp32).

    One that sees where things are gives its spatial features [B, S] fp32 as a third.
    """

    names_classes: bool = False  # whether logit k is the generator's class k, so that an accuracy makes sense
    is_inception: bool = False  # whether the features are the published FID's, so that published statistics apply

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]: ...


class ClassifierJudge(Judge):
    """A classifier of images in [-1, 1] with `features(images) -> [B, D]` and `head(features) -> logits [B, K]`."""

    names_classes = True

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(normalize(pixels))
        return features.float(), self.classifier.head(features).float()


class ReaderJudge(Judge):
    """A reader of shapes: its features, and logits of the shapes that it sees. `read` tells what is shown."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader.eval()
        self.read = reader.read

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = normalize(pixels)
        return self.reader.features(images).float(), self.reader.shape_logits(images).float()


class InceptionJudge(Judge):
    """Inception v3 of the published FID, by torch-fidelity: 2048 features, 1008 classes, its own resize to 299.

    Nothing is downloaded: `path` has the weights, torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.

    Args:
        spatial: give the features of the sFID too (Nash et al. 2021, arXiv 2103.03841, as ADM's evaluator takes them):
            the first 7 channels of mixed_6/conv, that is [B, 17 * 17 * 7], channels last.

    Raises:
        UserError: torch-fidelity is not installed, or the file is not such weights.
    """

    is_inception = True

    def __init__(self, path: str | Path, *, device: torch.device, spatial: bool = False) -> None:
        key = "inception_checkpoint"
        module = "torch_fidelity.feature_extractor_inceptionv3"
        Extractor = import_extra(module, extra="evaluation", wanted_by=key).FeatureExtractorInceptionV3
        weights = read_weights(path)
        require_finite(path, weights)
        with tempfile.NamedTemporaryFile(suffix=".pth") as checked:
            # torch-fidelity unpickles without restriction, so it only gets what was read safely and written anew.
            torch.save(weights, checked.name)
            try:
                network = Extractor("inception", ["2048", "logits_unbiased"], checked.name)
            except RuntimeError as error:
                raise UserError(f"{key} {path} does not hold torch-fidelity's Inception v3 weights") from error
        self.network = network.to(device).eval()
        self._spatial: list[Tensor] = []  # what the hook saw in a call
        if spatial:  # TensorFlow's block mixed_6 is Mixed_6d, and its first convolution ends with batch norm and ReLU
            hook = self.network.Mixed_6d.branch1x1.register_forward_hook
            hook(lambda module, inputs, output: self._spatial.append(output))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.network(pixels)
        maps = [output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1) for output in self._spatial]
        self._spatial.clear()
        return features.float(), logits.float(), *(output.float() for output in maps)


def judge_files(evaluation: Evaluation) -> dict[str, str]:
    """The weights of the judges that a recipe asks for, by the judges' names: classifier, inception, reader, reward."""
    files = {
        "classifier": evaluation.feature_checkpoint,
        "inception": evaluation.inception_checkpoint,
        "reader": evaluation.reader_checkpoint,
        "reward": evaluation.reward_checkpoint,
    }
    return {name: file for name, file in files.items() if file is not None}


def load_judges(evaluation: Evaluation, *, device: torch.device) -> dict[str, Judge]:
    """The judges of `judge_files`, loaded."""
    judges: dict[str, Judge] = {}
    for name, file in judge_files(evaluation).items():
        if name == "inception":
            judges[name] = InceptionJudge(file, device=device, spatial=True)
        elif name == "reader":
            judges[name] = ReaderJudge(load_reader(file).to(device))
        else:
            judges[name] = ClassifierJudge(load_classifier(file).to(device))
    return judges
