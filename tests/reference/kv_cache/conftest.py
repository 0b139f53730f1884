"""The course's trained model, ours and as transformers reads it, and prompts of its text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from reference.pretrained import corpus
from reference.transformer.course_model import FOLDER, load_course_model


@pytest.fixture(scope="session")
def course():
    """The model and ids of a few thousand characters."""
    model, tokenizer = load_course_model()
    return model.requires_grad_(False), torch.tensor(tokenizer.encode(corpus()[:6000]))


@pytest.fixture(scope="session")
def theirs():
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@pytest.fixture
def prompts(course):
    ids = course[1]
    return [ids[:23], ids[200:207], ids[400:401], ids[600:631]]
