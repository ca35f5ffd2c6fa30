"""The pipeline's stages, and the Prefect tasks that run them.

They turn artifacts in the store into folders for the library, and its results into artifacts.
"""
