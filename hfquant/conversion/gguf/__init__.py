"""A compressed model as one GGUF file for llama.cpp and its relatives, with the same codes and scales.

Which of their block types can say a weight exactly, and in which bytes: `blocks`.  What tensors are called and how rows
lie: `names`.  The vocabulary: `tokens`.  The file: `write`.
"""
