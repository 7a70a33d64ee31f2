"""XLA's quickest compilation, for programs that run a few times: a third of the time, for slower programs.

Passes over the program itself (partitioning, collectives, rematerialisation) are those of a real run; what it is turned
into by LLVM is not optimised. Figures of compiled programs (test_figures.py) are taken without.
"""
import jax

FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if jax.__version_info__ < (0, 11):  # later ones do not know these
  FLAGS += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
