"""XLA's quickest compilation, for programs that run a few times: a third of the time, for slower programs.

What LLVM makes of a program is not optimised, and fusions may be others. Collectives, and the numbers of the sharded
step, were compared and are those of a real run; tests of memory and of figures compile without these flags.
"""
import jax

FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if jax.__version_info__ < (0, 11):  # later ones do not know these
  FLAGS += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
