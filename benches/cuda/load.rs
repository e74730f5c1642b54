//! `load`: what the first use of kernels costs the host. Each call is a process of its own (`--load PLAN`), which opens the device, then
//! lets the driver compile and load what a plan needs: `compiled` without the driver's cache (`CUDA_CACHE_DISABLE=1`, which must be set
//! before the driver starts), `cached` with it, filled by the calls before.

use crate::case::{Case, Job, Timer, mixture};
use crate::support::folder::Folder;
use gatefold::cuda::driver::Driver;
use gatefold::cuda::{AttentionPlan, AttentionProblem, Device, KvShape, MoePlan, MoeProblem, NormPlan, NormProblem};
use gatefold::spec::{Attention, Norm};
use gatefold::{Dtype, Result};
use std::process::Command;
use std::time::Instant;

/// One small kernel, one of the largest, all of a mixture for few and for many tokens.
const PLANS: [&str; 4] = ["norm", "prefill-128", "moe-qwen3-30b-a3b-1", "moe-qwen3-30b-a3b-4096"];

pub fn cases(cases: &mut Vec<Case>) {
    for plan in PLANS {
        for is_cached in [false, true] {
            cases.push(Case {
                name: format!("load/{plan}/{}", if is_cached { "cached" } else { "compiled" }),
                kind: "alone",
                dtype: Dtype::BF16,
                flops: 0.0,
                make: Box::new(move |_| Ok(Box::new(Load { plan, is_cached }))),
            });
        }
    }
}

/// Seconds of a plan's `warmup` on a device that has just been opened.
fn first_use(plan: &str) -> Result<f64> {
    let device = Device::open(0)?;
    let limits = device.limits();
    let time = |warmup: &dyn Fn(&dyn Driver) -> Result<()>| {
        let start = Instant::now();
        warmup(&device).map(|()| start.elapsed().as_secs_f64())
    };
    match plan {
        "norm" => {
            let plan = NormPlan::new(&NormProblem::new(Norm::rms(1e-6), Dtype::BF16, 64, 2048))?;
            time(&|driver| plan.warmup(driver))
        }
        "prefill-128" => {
            let (spec, keys) = (Attention::causal(32, 8, 128), KvShape::ragged(4096));
            let plan = AttentionPlan::new(&AttentionProblem::new(spec, Dtype::BF16, 1, 4096, keys), &limits)?;
            time(&|driver| plan.warmup(driver))
        }
        _ => {
            let (_, tokens) = plan.rsplit_once('-').expect("a mixture and tokens");
            let tokens = tokens.parse().expect("a number of tokens");
            let plan = MoePlan::new(&MoeProblem::new(&mixture("qwen3-30b-a3b"), Dtype::BF16, tokens), &limits)?;
            time(&|driver| plan.warmup(driver))
        }
    }
}

/// The other process: its output are the seconds.
pub fn child(plan: &str) {
    assert!(PLANS.contains(&plan), "--load {plan}: expected one of {PLANS:?}");
    println!("{}", first_use(plan).unwrap_or_else(|error| panic!("{plan}: {error}")));
}

struct Load {
    plan: &'static str,
    is_cached: bool,
}

impl Job for Load {
    fn call(&mut self) -> Result<()> {
        unreachable!("`seconds` has another clock")
    }

    fn seconds(&mut self, _: &Timer) -> std::result::Result<f64, String> {
        let bench = std::env::current_exe().map_err(|e| e.to_string())?;
        let disable = if self.is_cached { "0" } else { "1" };
        let child = Command::new(bench).args(["--load", self.plan]).env("CUDA_CACHE_DISABLE", disable).output();
        let child = child.map_err(|e| e.to_string())?;
        let seconds = String::from_utf8_lossy(&child.stdout).trim().parse();
        seconds.map_err(|_| String::from_utf8_lossy(&child.stderr).trim().to_string())
    }

    /// Whether the kernels are right is seen where they are timed.
    fn check(&mut self) -> std::result::Result<(), String> {
        Ok(())
    }

    fn write(&mut self, _: &mut Folder) -> std::io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> f64 {
        0.0
    }
}
