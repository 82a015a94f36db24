"""torchvision's rule for folders of classes (datasets/folder.py of its 0.29)."""

import os

from PIL import Image


class ImageFolder:
    """Sorted folders are numbered; an image's class is the top folder that it is in."""

    def __init__(self, root: str):
        entries = os.scandir(root)
        self.classes = sorted(entry.name for entry in entries if entry.is_dir())
        self.class_to_idx = {name: k for k, name in enumerate(self.classes)}
        self.target_transform = None
        self.samples = []
        for name, number in self.class_to_idx.items():
            count = len(self.samples)
            for folder, _, files in sorted(os.walk(f"{root}/{name}", followlinks=True)):
                paths = [os.path.join(folder, file) for file in sorted(files)]
                paths = [path for path in paths if path.lower().endswith(".png")]
                self.samples += [(path, number) for path in paths]
            if len(self.samples) == count:
                raise FileNotFoundError(f"Found no valid file for the classes {name}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, number = self.samples[index]
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        return image, (self.target_transform or int)(number)
