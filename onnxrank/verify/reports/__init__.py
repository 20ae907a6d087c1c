"""Reports of `verify` in the forms that people, pipelines and review tools take; `onnxrank.formats` lists them."""
