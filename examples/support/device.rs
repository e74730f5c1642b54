//! The CUDA backend behind the examples' trait: on a GPU, or on the simulator.
//!
//! Weights are copied to the device once, everything else with each call.

use super::array::Array;
use super::backend::{Backend, FfnArrays, MoeArrays};
use super::staged::{self, Staged, StagedFfn, StagedMoe};
use gatefold::args::{
    AttentionInput, AttentionOutput, KvCache, KvCacheMut, MoeInput, MoeOutput, QkvInput, QkvOutput, RopeTable,
    RouteInput, RouteOutput, Routing, WkvInput, WkvOutput,
};
use gatefold::cpu::Float;
use gatefold::cuda::Queue;
use gatefold::cuda::driver::Driver;
use gatefold::spec::{Attention, ExpertFfn, Ffn, Mla, Moe, Norm, QkvPrep, Rope, Router};
use gatefold::{Error, Result, View, ViewMut};

/// A device with activations and weights of type `T`.
pub struct DeviceBackend<'d, T> {
    driver: &'d dyn Driver,
    name: String,
    _type: std::marker::PhantomData<T>,
}

impl<'d, T: Float> DeviceBackend<'d, T> {
    pub fn new(driver: &'d dyn Driver, name: &str) -> Self {
        DeviceBackend { driver, name: name.into(), _type: std::marker::PhantomData }
    }

    /// Products read rows of whole 16 bytes.
    fn check_width(&self, what: &str, width: usize) -> Result<()> {
        let multiple = 16 / T::DTYPE.size_bytes();
        if width.is_multiple_of(multiple) {
            return Ok(());
        }
        unsupported(format!("a {what} of {width}, no multiple of {multiple}"))
    }

    fn check_block(&self, spec: &Ffn) -> Result<()> {
        self.check_width("hidden size", spec.hidden_size)?;
        self.check_width("intermediate size", spec.intermediate_size)
    }
}

fn unsupported<R>(case: impl Into<String>) -> Result<R> {
    Err(Error::Unsupported { backend: "cuda".into(), case: case.into() })
}

impl<'d, T: Float> Backend for DeviceBackend<'d, T> {
    type A = T;
    type S = f32;
    type Linear<'a> = Staged<'d, T, 2>;
    type Mlp<'a> = StagedFfn<'d, T>;
    type Moe<'a> = StagedMoe<'d, T, T>;
    type Mla<'a> = Array<T>;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn pack_linear<W: Float>(&mut self, weight: &Array<W>) -> Result<Staged<'d, T, 2>> {
        self.check_width("width", weight.rows().shape()[1])?;
        Staged::new(self.driver, weight.cast::<T>().rows())
    }
    fn pack_mlp<W: Float>(&mut self, spec: &Ffn, weights: &FfnArrays<W>) -> Result<StagedFfn<'d, T>> {
        self.check_block(spec)?;
        StagedFfn::new(self.driver, &weights.cast::<T>().block(&weights.biases::<f32>()))
    }
    fn pack_moe<W: Float>(&mut self, spec: &Moe, weights: &MoeArrays<W>) -> Result<StagedMoe<'d, T, T>> {
        self.check_block(&spec.experts.ffn)?;
        spec.shared.as_ref().map_or(Ok(()), |shared| self.check_block(&shared.ffn))?;
        StagedMoe::new(self.driver, &weights.cast::<T>().weights(&weights.vectors::<f32>()))
    }
    fn pack_mla<W: Float>(&mut self, _: &Mla, kv_b: &Array<W>) -> Result<Array<T>> {
        Ok(kv_b.cast())
    }
    fn norm<const N: usize>(
        &mut self,
        spec: &Norm,
        x: View<'_, T, N>,
        weight: Option<&[f32]>,
        bias: Option<&[f32]>,
        out: ViewMut<'_, T, N>,
    ) -> Result<()> {
        staged::norm(self.driver, spec, x, weight, bias, out)
    }
    fn linear(
        &mut self,
        x: View<'_, T, 2>,
        weight: &Staged<'d, T, 2>,
        bias: Option<&[f32]>,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        staged::linear_with(&mut Queue::new(self.driver), x, weight, bias, out)
    }
    fn prepare_qkv(&mut self, spec: &QkvPrep, input: &QkvInput<'_, T, f32>, output: QkvOutput<'_, T>) -> Result<()> {
        staged::prepare_qkv(self.driver, spec, input, output)
    }
    fn rope(
        &mut self,
        spec: &Rope,
        x: View<'_, T, 3>,
        positions: &[u32],
        table: &RopeTable<'_, f32>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        staged::rope(self.driver, spec, x, positions, table, out)
    }
    fn kv_append(&mut self, input: &KvCache<'_, T>, cache: KvCacheMut<'_, T>) -> Result<()> {
        staged::kv_append(self.driver, input, cache)
    }
    fn attention(
        &mut self,
        spec: &Attention,
        input: &AttentionInput<'_, T, f32>,
        output: AttentionOutput<'_, T, f32>,
    ) -> Result<()> {
        staged::attention(self.driver, spec, input, output)
    }
    fn mla_absorb_query(
        &mut self,
        spec: &Mla,
        q_nope: View<'_, T, 3>,
        kv_b: &Array<T>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        staged::mla_absorb_query(self.driver, spec, q_nope, kv_b.view(), out)
    }
    fn mla_project_value(
        &mut self,
        spec: &Mla,
        latent: View<'_, T, 3>,
        kv_b: &Array<T>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        staged::mla_project_value(self.driver, spec, latent, kv_b.view(), out)
    }
    fn sigmoid_mul(&mut self, x: View<'_, T, 2>, gate: View<'_, T, 2>, out: ViewMut<'_, T, 2>) -> Result<()> {
        staged::sigmoid_mul(self.driver, x, gate, out)
    }
    fn add(&mut self, x: View<'_, T, 2>, y: View<'_, T, 2>, multiplier: f64, out: ViewMut<'_, T, 2>) -> Result<()> {
        staged::add(self.driver, x, y, multiplier, out)
    }
    fn mlp(&mut self, spec: &Ffn, x: View<'_, T, 2>, weights: &StagedFfn<'d, T>, out: ViewMut<'_, T, 2>) -> Result<()> {
        staged::mlp_with(&mut Queue::new(self.driver), spec, x, weights, out)
    }
    fn router_logits(
        &mut self,
        spec: &Router,
        hidden: View<'_, T, 2>,
        weights: &StagedMoe<'d, T, T>,
        logits: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        staged::router_logits_with(self.driver, spec, hidden, weights, 0, logits)
    }
    fn route(&mut self, spec: &Router, input: &RouteInput<'_, f32>, output: RouteOutput<'_, f32>) -> Result<()> {
        staged::route(self.driver, spec, input, output)
    }
    fn expert_ffn(
        &mut self,
        spec: &ExpertFfn,
        hidden: View<'_, T, 2>,
        routing: &Routing<'_, f32>,
        weights: &StagedMoe<'d, T, T>,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        staged::expert_ffn_with(&mut Queue::new(self.driver), spec, hidden, routing, &weights.experts, out)
    }
    fn moe(
        &mut self,
        spec: &Moe,
        input: &MoeInput<'_, T, f32>,
        weights: &StagedMoe<'d, T, T>,
        output: MoeOutput<'_, T, f32>,
    ) -> Result<()> {
        staged::moe_with(&mut Queue::new(self.driver), spec, input, weights, output)
    }
    fn wkv(&mut self, input: &WkvInput<'_, T, f32>, output: WkvOutput<'_, T, f32>) -> Result<()> {
        staged::wkv(self.driver, input, output)
    }
}
