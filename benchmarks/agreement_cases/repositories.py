"""The authors' repositories, by commit. `git hash-object FILE` gives the hashes of files."""

from __future__ import annotations

from .sources import Repository

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
}
