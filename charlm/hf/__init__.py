"""charlm's models in transformers: `import charlm.hf` registers them with its Auto classes.

They read a folder of `scripts/export.py --format transformers`; no code and no pickle in it is loaded.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise ImportError("charlm.hf needs transformers: pip install 'charlm[hf]'") from error

from charlm.hf.config import CharlmConfig
from charlm.hf.model import CharlmForCausalLM
from charlm.hf.tokenizer import CharlmTokenizer

AutoConfig.register(CharlmConfig.model_type, CharlmConfig, exist_ok=True)
AutoTokenizer.register(CharlmConfig, tokenizer_class=CharlmTokenizer, exist_ok=True)
AutoModelForCausalLM.register(CharlmConfig, CharlmForCausalLM, exist_ok=True)
