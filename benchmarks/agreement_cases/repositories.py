"""The authors' repositories, by commit. `git hash-object FILE` gives the hashes of files."""

from __future__ import annotations

from .sources import Repository

TRANSFORMERS = ("transformers", "transformers.utils", "transformers.utils.versions")
TENSORLY = ("tensorly", "tensorly.decomposition")

# What files of mergekit, and of what was made from it, import and do not need here.
MERGEKIT = (
    "mergekit",
    "mergekit.architecture",
    "mergekit.common",
    "mergekit.graph",
    "mergekit.merge_methods",
    "mergekit.merge_methods.base",
    "mergekit.merge_methods.rectify_embed",
    "mergekit.options",
)
REPOSITORIES = {
    "google/automl": Repository(
        "6a54c8741e7c3265d4547c4f35f47a0391122dc5",
        "lion/lion_pytorch.py",
        {"lion/lion_pytorch.py": "b27f4e54cffab2e04e2c8e1bd76515123d87b3f5"},
    ),
    "zyushun/Adam-mini": Repository(
        "402aadfed23719f3b92c8e78b5d49ad499ff7ada",
        "adam_mini/adam_mini.py",
        {"adam_mini/adam_mini.py": "5099fb4d252b9c649ad788b0ebad9d07a4329741"},
    ),
    "nikhilvyas/SOAP": Repository(
        "a1e553530fde97d0e6b307d7c82ac6d38b072340",
        "soap.py",
        {"soap.py": "a6362cc9ed2f50ed299204eb3bf07715e7280757"},
    ),
    "KellerJordan/Muon": Repository(
        "857d1adc159e098212f828d927460782d3da59e9",
        "muon.py",
        {"muon.py": "8f117329d5f1d646749a2ec6b80d434610104c4a"},
    ),
    "thib-s/flash-newton-schulz": Repository(
        "cdb03db0e6c59e82365426373a1601fadfdf7ab3",
        "newton_schulz_triton.py",
        {"newton_schulz_triton.py": "193d74a58a8969a98b9ba16ff9869e5dbd57d93c"},
        stubs=("triton", "triton.language"),
    ),
    "timlautk/polargrad": Repository(
        "79f3c6fc67c8b17af92fd2841509d75e04525887",
        "polar_grad.py",
        {
            "polar_grad.py": "315f7dcfe8cd5fcd8e6ffb2ef7808f0c9bd8eb40",
            "polar.py": "6cf7f67488d93e93ea9039279c2abf8438c032ef",
            "qdwh.py": "802cab5e9929dc00019ff87ee1c7ce840a7b4216",
        },
    ),
    "minxin-zhg/namo": Repository(
        "a3f37b01dc8addf1a626be851168a8cacdcd34f9",
        "src/namo.py",
        {"src/namo.py": "b934a54791c124d91e69a4843c6fe091bcf27b9d"},
    ),
    "ryyzn9/AuON": Repository(
        "bba2e82200825bbf8574462df32130af64a39f42",
        "auon/optimizer.py",
        {"auon/optimizer.py": "af77a91525f82cb4d0305e92befd2ed2dd1240c7"},
    ),
    "harveyThomas4692/Induced-Metric-Optimiser": Repository(
        "754ae88c39a558b4530baa229b626193b5ad25c2",
        "optimisers/torch_imp.py",
        {"optimisers/torch_imp.py": "fee2b4ae6aa1cc073ec1d586f7b08c295165d1b7"},
    ),
    "Hintonthu/optimistic-amsgrad": Repository(
        "07fd55e66adf54b3b84165361674a3e51daabcca",
        "Optadam_torch.py",
        {"Optadam_torch.py": "614c93b9e3c75aba7d38b90a0d960343b5c06f06"},
    ),
    "davda54/sam": Repository(
        "3c3afdbd71cff2462ec91c734b3d1170bd0f3707",
        "sam.py",
        {"sam.py": "df9bcb7d97791f2f3036c2b173b12f8c572d0d80"},
    ),
    "Westlake-AI/SEMA": Repository(
        "45811267deafdc90d32401d4dab4d84ed2a29d51",
        "detection/mmdet_custom/core/hook/switch_ema.py",
        {"detection/mmdet_custom/core/hook/switch_ema.py": "eb59f172b8fd1fe12fa2582aaac8456c30a94b0a"},
        stubs=("mmcv", "mmcv.parallel", "mmcv.runner", "mmcv.runner.hooks"),
    ),
    "ThomasWalker1/grokalign": Repository(
        "2025b6e36030b0e7f501a8c4d9a80717205bd740",
        "utils.py",
        {"utils.py": "05393892d13816898e5fcbb364f90612e4b2ef3b"},
        stubs=("einops", "tqdm"),
    ),
    "Rose-STL-Lab/Teleportation-Optimization": Repository(
        "d60eac04e974dddd0c5b8fcef915f57cc18d7a20",
        "gradient_descent_mlp_utils.py",
        {"gradient_descent_mlp_utils.py": "d5321c28e46ac47438eecde428cc2ee79789e27f"},
    ),
    "gianlucabencomo/implicitMAP": Repository(
        "6f83299fcb8f98091a604926636be496f34276e4",
        "nonlinear/optimizers.py",
        {
            "nonlinear/optimizers.py": "db6e85c914aada0e888b968af730de4740716fd3",
            "nonlinear/helper.py": "0f4c697cbb7bbdf49cb78f703392d781bb8248ef",
        },
        stubs=("matplotlib", "matplotlib.pyplot"),
        needs=("scipy",),
    ),
    "DAVIAN-Robotics/SimbaV2": Repository(
        "86899c277cdc697b2b02d827243de1ea93f20a1d",
        "scale_rl/agents/simbaV2/simbaV2_update.py",
        {"scale_rl/agents/simbaV2/simbaV2_update.py": "cab866f1f7d2d870a51949f6a82363bc796047a1"},
        stubs=(
            "flax",
            "scale_rl",
            "scale_rl.agents",
            "scale_rl.agents.jax_utils",
            "scale_rl.agents.jax_utils.network",
            "scale_rl.agents.jax_utils.tree_utils",
            "scale_rl.buffers",
        ),
        needs=("jax",),
    ),
    "Liuhong99/Sophia": Repository(
        "a7e157229b71d58cf995d32854f1be15c265b350",
        "sophia.py",
        {"sophia.py": "1e552809e5e8710532ead90dfc706048cc274123"},
    ),
    "facebookresearch/optimizers": Repository(
        "f60660661194de26d3ee78bae6d15820ff8e583d",
        "distributed_shampoo/distributed_shampoo.py",
        {
            "distributed_shampoo/distributed_shampoo.py": "0bbbc8448f8efa76e2d42fb36b69aa73253b7621",
            "distributed_shampoo/preconditioner/shampoo_preconditioner_list.py": "d4a67329f1f2701d936d5a7257ad0296d27652a6",
            "distributed_shampoo/preconditioner/matrix_functions.py": "48347e41c220de5d2eb6f2deddee2d94717d6c79",
        },
        folder=".",
    ),
    "Sike-Wang/low-bit-Shampoo": Repository(
        "fc46867b3afbc8e4f72a541475bb883ce94e8d4c",
        "optimizers/shampoo2.py",
        {
            "optimizers/shampoo2.py": "ab090bdfbc338fb262e5510e4d225773aa91776f",
            "optimizers/matrix_functions.py": "08e3d180aa1b0f2e0dd2af30f972b84db88a308e",
            "qtensor/utils.py": "429d9db6012c7b5e4ab63973ef25555c3372c5af",
        },
        folder=".",
        stubs=("qtensor.cextension",),
    ),
    "Mohammad-Mozaffari/mkor": Repository(
        "3a0e3bb2df346851569e98799d0f340556bad811",
        "mkor/mkor.py",
        {
            "mkor/mkor.py": "c37749f9d501d1456b9a2aed9e1c27840383719d",
            "mkor/utils/factors.py": "16488be1c805695443777fd15af548c1f8b252c1",
        },
        folder=".",
    ),
    "jiaweizzhao/GaLore": Repository(
        "2cc66f88cce189e505affbb91042a8e77f5bf4e9",
        "galore_torch/adamw.py",
        {
            "galore_torch/adamw.py": "5a49631bcc4b2d51d7bd4734e4a75ceeac8191dc",
            "galore_torch/galore_projector.py": "242d74d0d6b5f04f8f526c1cccc19b0852c57bfb",
        },
        folder=".",
        stubs=(*TRANSFORMERS, *TENSORLY, "bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"),
    ),
    "fzmushko/FRUGAL": Repository(
        "c7ebe4c242f7908e036c287e3a10512a84634648",
        "frugal/adamw.py",
        {
            "frugal/adamw.py": "fff95a3011e02b24da3abde9da06e671d2752cee",
            "frugal/proj_optimizer_templates.py": "6240d5b40b17600f828bf6f0fa6dc289ac0bcbd6",
            "frugal/galore_projector.py": "25b32c8acbc8d64ee5cb3067db33adca25f83a23",
            "frugal/coordinate_projector.py": "7a7eafb9c4448c6803b86e79d126802cd205eea2",
        },
        folder=".",
        stubs=TRANSFORMERS,
    ),
    "selfsupervised-ai/Natural-GaLore": Repository(
        "e23336d7ca1e9580494c13c8b1ac9ca623a1a2a1",
        "code/natural_galore/subspace_adamw.py",
        {
            "code/natural_galore/subspace_adamw.py": "48e8905bcc7227e840b4cefa3895adbdbff20979",
            "code/natural_galore/galore_projector_tensor.py": "e1b3d7e67df8cc97b7ba2ef55cd27bf388054997",
        },
        folder="code",
        needs=("tensorly",),
    ),
    "NitzanHod/compact": Repository(
        "a28713010590d022ae6d26c399971b583bf71eb2",
        "modules/linear.py",
        {
            "modules/linear.py": "a549d8caa6123f25693ec891675a74440e2f3a90",
            "functions/linear.py": "78af902ea604cb95f005be945be321578be6a117",
            "random_utils/random_sampling.py": "5ef64fec332f2f1cf1b665562b738958e1338a70",
            "optimizers/adamw.py": "b7ff1596707f2e1e8b55c4e7ae26ec77d6991260",
        },
        folder=".",
        stubs=(*TRANSFORMERS, "wandb"),
    ),
    "Ledzy/BAdam": Repository(
        "bf989dcb8c1a7bbcf7360034b323e1b5616bf3e4",
        "src/badam/block_optim.py",
        {"src/badam/block_optim.py": "a2bf7c36dfe9beb29a4d10f006328dd29cc64e9d"},
        folder="src",
        stubs=(
            *TRANSFORMERS,
            "transformers.integrations",
            "transformers.pytorch_utils",
            "transformers.trainer_callback",
            "deepspeed",
            "deepspeed.runtime",
            "deepspeed.runtime.zero",
            "deepspeed.runtime.zero.utils",
            "deepspeed.utils",
        ),
    ),
    "IST-DASLab/M-FAC": Repository(
        "8116367fb537b48484e2e4bde24f11f42b117f8a",
        "optim.py",
        {
            "optim.py": "eca73f46afc38e3a57dd660f48a1f912723302eb",
            "prun.py": "e591657c4795cd1650d19fee18a4d6235f495902",
            "main_prun.py": "dfcdc16deb128ce7f8d3a57f8484d3b4d69ea5f2",
        },
        stubs=("lib", "lib.data", "lib.data.datasets"),
    ),
    "IST-DASLab/EFCP": Repository(
        "a33a3a5725fbe78ab3ed7e8ce246a8c77b0dfb62",
        "optimizers/sparse/SparseGradientMFAC.py",
        {
            "optimizers/sparse/SparseGradientMFAC.py": "269b9008ad7f4483985210975d7d49a1bb794784",
            "optimizers/sparse/SparseHinvSequential.py": "ecc7b0cc3ebef12bc5342acbb92d97d885ababf4",
            "helpers/optim.py": "fed06164c30f0f2b69364ae6e6be1691fa858435",
            "optimizers/lowrank/low_rank_optim.py": "e079986b72f14cc0868e96c2453aab795a9e1539",
            "optimizers/lowrank/compressor.py": "c443840786eb4233d031f4f8537114fca02517bb",
            "optimizers/dense/GGT.py": "901787d62b71dd9cc9c2e859902b7d832fa2651e",
        },
        folder=".",
        stubs=("wandb", "gpustat", "yaml", "tqdm", "line_profiler"),
    ),
    "IST-DASLab/ISTA-DASLab-Optimizers": Repository(
        "4c98e6e7d8a51147cc8fdd77458baac881852b56",
        "ista_daslab_optimizers/micro_adam/micro_adam.py",
        {"ista_daslab_optimizers/micro_adam/micro_adam.py": "77e2ce4e398ccd7452974d2469f0f6dd41b2c8fb"},
        folder=".",
        stubs=(
            "wandb",
            "gpustat",
            "triton",
            "triton.language",
            "ista_daslab_cuda_tools",
            "ista_daslab_cuda_micro_adam",
            "ista_daslab_cuda_dense_mfac",
            "ista_daslab_cuda_sparse_mfac",
        ),
    ),
    "youyve/OptEx": Repository(
        "26c4c9e38db7ec13c18ff1ab1672b529e65821ba",
        "optex_jax/OptEx_JAX.py",
        {"optex_jax/OptEx_JAX.py": "ac57b95f66502370efdc39e531a48416b771ef48"},
        needs=("jax", "optax", "sklearn"),
    ),
    "google/jaxopt": Repository(
        "2de13bf01fd29e22862236a0d869f2b14e1629d4",
        "jaxopt/_src/implicit_diff.py",
        {
            "jaxopt/_src/implicit_diff.py": "1eae2e623cdd310970652312cbe2c768bd0ea8de",
            "jaxopt/_src/linear_solve.py": "34b5d0dd0c2d8b5f5beb92bbf8ca8bac9c98bc30",
        },
        folder=".",
        needs=("jax", "scipy"),
    ),
    "pmahdavi/ota-merge": Repository(
        "eee703f5fddc8746469c4ef704590ebf8bebedbf",
        "mergekit/merge_methods/ota.py",
        {"mergekit/merge_methods/ota.py": "785cc9291649cb92f74be78b9a2672017b72a776"},
        stubs=MERGEKIT,
        needs=("pydantic", "huggingface_hub"),
    ),
    "rabeehk/compacter": Repository(
        "e123daaaee59488e305297b9685c084edc07b5c0",
        "seq2seq/hypercomplex/layers.py",
        {
            "seq2seq/hypercomplex/layers.py": "53288da59fc5a41e4c3363fcc498367ed93da0d5",
            "seq2seq/hypercomplex/kronecker.py": "28177326bdeffd4311f2127b4efcf963562d6ce3",
            "seq2seq/hypercomplex/inits.py": "c1a2d9619d7cc8a9d84a7bd462a58e5cfa30fd59",
        },
        folder="seq2seq",
    ),
    "arcee-ai/mergekit": Repository(
        "a6e402884ba9bc30da7f23e8304a35f19485de95",
        "mergekit/merge_methods/slerp.py",
        {"mergekit/merge_methods/slerp.py": "208cc2578e945cb730f5db8aea7f98b3a8a37849"},
        stubs=MERGEKIT,
    ),
    "yule-BUAA/MergeLM": Repository(
        "6d49ad96fd69c92013654b837041b868aa806564",
        "model_merging_methods/mask_weights_utils.py",
        {"model_merging_methods/mask_weights_utils.py": "4d403cb2ad9d80273e257ca38dae3e236e3545bb"},
        stubs=("tqdm", "utils", "utils.utils", "model_merging_methods", "model_merging_methods.task_vector"),
    ),
    "Facico/GOAT-PEFT": Repository(
        "ef4d21a41682bcf3b808f9273ace16cccfc7c648",
        "goat/peta/src/goat/layer.py",
        {"goat/peta/src/goat/layer.py": "ed5b4493439924470836d76c525241913cd39875"},
        needs=("peft",),
    ),
    "LucasXinYu/AltLoRA": Repository(
        "94b219882abcaa6004d2029fd8a09cd190a8a9aa",
        "optimizer_new.py",
        {"optimizer_new.py": "f21e8df6fcad53918d958c7b3409961cdea283c2"},
    ),
    "RaghavSinghal10/lora-sb": Repository(
        "37b33d4c4c573de20f314bc1231b84ee49771759",
        "utils/gradient_utils.py",
        {
            "utils/gradient_utils.py": "8974d76f2b07e1070ebe7217d0ffa5869d65db50",
            "utils/svd_utils.py": "c0905972141b1c39f2719b75e1f79634c2534933",
        },
        folder=".",
        stubs=("tqdm", "tqdm.auto", "accelerate", "utils.offload_utils_for_quant"),
    ),
}
