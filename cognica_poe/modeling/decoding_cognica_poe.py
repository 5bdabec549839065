"""Generation modes of a Product-of-Experts model (model card, "PoE-specific inference")."""


class PoEDecodingMixin:
    pass
