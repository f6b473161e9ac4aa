"""The lens: what each layer of a model expects along a text, as a library, a page and its server."""
