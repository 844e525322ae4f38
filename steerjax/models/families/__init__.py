"""The families of models, a file each."""

from steerjax.models.families.family import Family
from steerjax.models.families.llama import LLAMA
from steerjax.models.families.mistral import MISTRAL
from steerjax.models.families.qwen2 import QWEN2
from steerjax.models.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
