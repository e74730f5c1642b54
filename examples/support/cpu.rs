//! The CPU backend behind the examples' trait.

use super::array::Array;
use super::backend::{Backend, FfnArrays, MoeArrays};
use gatefold::args::{
    AttentionInput, AttentionOutput, KvCache, KvCacheMut, MoeInput, MoeOutput, QkvInput, QkvOutput, RopeTable,
    RouteInput, RouteOutput, Routing, WkvInput, WkvOutput,
};
use gatefold::cpu::{self, Cpu, Float};
use gatefold::spec::{Attention, ExpertFfn, Ffn, Mla, Moe, Norm, QkvPrep, Rope, Router};
use gatefold::{Result, View, ViewMut};

/// The CPU backend with activations of type `T`.
pub struct CpuBackend<T> {
    pub cpu: Cpu,
    _type: std::marker::PhantomData<T>,
}

impl<T> CpuBackend<T> {
    pub fn new(cpu: Cpu) -> Self {
        CpuBackend { cpu, _type: std::marker::PhantomData }
    }
}

impl<T: cpu::Float> Backend for CpuBackend<T> {
    type A = T;
    type S = f32;
    type Linear<'a> = cpu::PackedLinear;
    type Mlp<'a> = cpu::PackedFfn;
    type Moe<'a> = cpu::PackedMoe;
    type Mla<'a> = cpu::PackedMla;

    fn name(&self) -> String {
        self.cpu.level().name().into()
    }

    fn pack_linear<W: Float>(&mut self, weight: &Array<W>) -> Result<cpu::PackedLinear> {
        cpu::PackedLinear::pack(weight.rows())
    }
    fn pack_mlp<W: Float>(&mut self, spec: &Ffn, weights: &FfnArrays<W>) -> Result<cpu::PackedFfn> {
        cpu::PackedFfn::pack(spec, &weights.block(&weights.biases::<f32>()))
    }
    fn pack_moe<W: Float>(&mut self, spec: &Moe, weights: &MoeArrays<W>) -> Result<cpu::PackedMoe> {
        cpu::PackedMoe::pack(spec, &weights.weights(&weights.vectors::<f32>()))
    }
    fn pack_mla<W: Float>(&mut self, spec: &Mla, kv_b: &Array<W>) -> Result<cpu::PackedMla> {
        cpu::PackedMla::pack(spec, kv_b.view())
    }
    fn norm<const N: usize>(
        &mut self,
        spec: &Norm,
        x: View<'_, T, N>,
        weight: Option<&[f32]>,
        bias: Option<&[f32]>,
        out: ViewMut<'_, T, N>,
    ) -> Result<()> {
        cpu::norm(&mut self.cpu, spec, x, weight, bias, out)
    }
    fn linear(
        &mut self,
        x: View<'_, T, 2>,
        weight: &cpu::PackedLinear,
        bias: Option<&[f32]>,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        cpu::linear(&mut self.cpu, x, weight, bias, out)
    }
    fn prepare_qkv(&mut self, spec: &QkvPrep, input: &QkvInput<'_, T, f32>, output: QkvOutput<'_, T>) -> Result<()> {
        cpu::prepare_qkv(&mut self.cpu, spec, input, output)
    }
    fn rope(
        &mut self,
        spec: &Rope,
        x: View<'_, T, 3>,
        positions: &[u32],
        table: &RopeTable<'_, f32>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        cpu::rope(&mut self.cpu, spec, x, positions, table, out)
    }
    fn kv_append(&mut self, input: &KvCache<'_, T>, cache: KvCacheMut<'_, T>) -> Result<()> {
        cpu::kv_append(&mut self.cpu, input, cache)
    }
    fn attention(
        &mut self,
        spec: &Attention,
        input: &AttentionInput<'_, T, f32>,
        output: AttentionOutput<'_, T, f32>,
    ) -> Result<()> {
        cpu::attention(&mut self.cpu, spec, input, output)
    }
    fn mla_absorb_query(
        &mut self,
        spec: &Mla,
        q_nope: View<'_, T, 3>,
        kv_b: &cpu::PackedMla,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        cpu::mla_absorb_query(&mut self.cpu, spec, q_nope, kv_b, out)
    }
    fn mla_project_value(
        &mut self,
        spec: &Mla,
        latent: View<'_, T, 3>,
        kv_b: &cpu::PackedMla,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        cpu::mla_project_value(&mut self.cpu, spec, latent, kv_b, out)
    }
    fn sigmoid_mul(&mut self, x: View<'_, T, 2>, gate: View<'_, T, 2>, out: ViewMut<'_, T, 2>) -> Result<()> {
        cpu::sigmoid_mul(&mut self.cpu, x, gate, out)
    }
    fn add(&mut self, x: View<'_, T, 2>, y: View<'_, T, 2>, multiplier: f64, out: ViewMut<'_, T, 2>) -> Result<()> {
        cpu::add(&mut self.cpu, x, y, multiplier, out)
    }
    fn mlp(&mut self, spec: &Ffn, x: View<'_, T, 2>, weights: &cpu::PackedFfn, out: ViewMut<'_, T, 2>) -> Result<()> {
        cpu::mlp(&mut self.cpu, spec, x, weights, out)
    }
    fn router_logits(
        &mut self,
        spec: &Router,
        hidden: View<'_, T, 2>,
        weights: &cpu::PackedMoe,
        logits: ViewMut<'_, f32, 2>,
    ) -> Result<()> {
        cpu::router_logits(&mut self.cpu, spec, hidden, weights.router(), weights.router_bias(), 0, logits)
    }
    fn route(&mut self, spec: &Router, input: &RouteInput<'_, f32>, output: RouteOutput<'_, f32>) -> Result<()> {
        cpu::route(&mut self.cpu, spec, input, output)
    }
    fn expert_ffn(
        &mut self,
        spec: &ExpertFfn,
        hidden: View<'_, T, 2>,
        routing: &Routing<'_, f32>,
        weights: &cpu::PackedMoe,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        cpu::expert_ffn(&mut self.cpu, spec, hidden, routing, weights.experts(), out)
    }
    fn moe(
        &mut self,
        spec: &Moe,
        input: &MoeInput<'_, T, f32>,
        weights: &cpu::PackedMoe,
        output: MoeOutput<'_, T, f32>,
    ) -> Result<()> {
        cpu::moe(&mut self.cpu, spec, input, weights, output)
    }
    fn wkv(&mut self, input: &WkvInput<'_, T, f32>, output: WkvOutput<'_, T, f32>) -> Result<()> {
        cpu::wkv(&mut self.cpu, input, output)
    }
}
