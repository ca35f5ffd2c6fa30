"""The pipeline's stages, and the Prefect tasks that run them.

Artifacts in the store become folders for the library here, and its folders become artifacts.
"""
