//! The reference on activations of a stored type: f64 inside, rounded once where a function stores its result.

use super::array::Array;
use super::backend::{Backend, Block, FfnArrays, Matrix, Mixture, MoeArrays, Reference};
use gatefold::args::{
    AttentionInput, AttentionOutput, KvCache, KvCacheMut, MoeInput, MoeOutput, QkvInput, QkvOutput, RopeTable,
    RouteInput, RouteOutput, Routing, WkvInput, WkvOutput,
};
use gatefold::cpu::Float;
use gatefold::spec::{Attention, ExpertFfn, Ffn, Mla, Moe, Norm, QkvPrep, Rope, Router};
use gatefold::{Element, Result, View, ViewMut, reference};
use std::marker::PhantomData;

/// The reference with activations of type `T`.
#[derive(Default)]
pub struct Stored<T> {
    exact: Reference,
    _type: PhantomData<T>,
}

/// `f(i)` for the indices of all rows of an array, in order.
fn for_rows<const N: usize>(shape: [usize; N], mut f: impl FnMut(&[usize])) {
    let rows: usize = shape[..N - 1].iter().product();
    for mut row in 0..rows {
        let mut index = [0; N];
        for d in (0..N - 1).rev() {
            (index[d], row) = (row % shape[d], row / shape[d]);
        }
        f(&index[..N - 1]);
    }
}

/// Runs with room for exact numbers, then rounds them into `out`.
fn round<T: Element, const N: usize>(
    mut out: ViewMut<'_, T, N>,
    run: impl FnOnce(ViewMut<'_, f64, N>) -> Result<()>,
) -> Result<()> {
    let shape = out.shape();
    let mut exact = vec![0.0; shape.iter().product()];
    run(ViewMut::new(&mut exact, shape))?;
    let exact = View::new(&exact, shape);
    for_rows(shape, |row| {
        for (out, x) in out.row_mut(row).iter_mut().zip(exact.row(row)) {
            *out = T::from_f64(*x);
        }
    });
    Ok(())
}

fn widen<T: Element>(x: View<'_, T, 2>) -> Array<f64> {
    let [rows, width] = x.shape();
    let wide = (0..rows).flat_map(|i| x.row(&[i]).iter().map(|x| x.to_f64()));
    Array::new(wide.collect(), &[rows, width])
}

impl<T: Element> Backend for Stored<T> {
    type A = T;
    type S = f64;
    type Linear<'a> = &'a dyn Matrix;
    type Mlp<'a> = &'a dyn Block;
    type Moe<'a> = &'a dyn Mixture;
    type Mla<'a> = Array<f64>;

    fn name(&self) -> String {
        self.exact.name()
    }

    fn pack_linear<'a, W: Float>(&mut self, weight: &'a Array<W>) -> Result<&'a dyn Matrix> {
        self.exact.pack_linear(weight)
    }
    fn pack_mlp<'a, W: Float>(&mut self, spec: &Ffn, weights: &'a FfnArrays<W>) -> Result<&'a dyn Block> {
        self.exact.pack_mlp(spec, weights)
    }
    fn pack_moe<'a, W: Float>(&mut self, spec: &Moe, weights: &'a MoeArrays<W>) -> Result<&'a dyn Mixture> {
        self.exact.pack_moe(spec, weights)
    }
    fn pack_mla<W: Float>(&mut self, spec: &Mla, kv_b: &Array<W>) -> Result<Array<f64>> {
        self.exact.pack_mla(spec, kv_b)
    }
    fn norm<const N: usize>(
        &mut self,
        spec: &Norm,
        x: View<'_, T, N>,
        weight: Option<&[f64]>,
        bias: Option<&[f64]>,
        out: ViewMut<'_, T, N>,
    ) -> Result<()> {
        round(out, |out| reference::norm(spec, x, weight, bias, out))
    }
    fn linear(
        &mut self,
        x: View<'_, T, 2>,
        weight: &&dyn Matrix,
        bias: Option<&[f64]>,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        round(out, |out| self.exact.linear(widen(x).view(), weight, bias, out))
    }
    fn prepare_qkv(&mut self, spec: &QkvPrep, input: &QkvInput<'_, T, f64>, output: QkvOutput<'_, T>) -> Result<()> {
        let QkvOutput { q, k, v, .. } = output;
        round(q, |q| round(k, |k| round(v, |v| reference::prepare_qkv(spec, input, QkvOutput::new(q, k, v)))))
    }
    fn rope(
        &mut self,
        spec: &Rope,
        x: View<'_, T, 3>,
        positions: &[u32],
        table: &RopeTable<'_, f64>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        round(out, |out| reference::rope(spec, x, positions, table, out))
    }
    fn kv_append(&mut self, input: &KvCache<'_, T>, cache: KvCacheMut<'_, T>) -> Result<()> {
        reference::kv_append(input, cache)
    }
    fn attention(
        &mut self,
        spec: &Attention,
        input: &AttentionInput<'_, T, f64>,
        output: AttentionOutput<'_, T, f64>,
    ) -> Result<()> {
        let AttentionOutput { out, lse, .. } = output;
        round(out, |out| {
            let mut output = AttentionOutput::new(out);
            output.lse = lse;
            reference::attention(spec, input, output)
        })
    }
    fn mla_absorb_query(
        &mut self,
        spec: &Mla,
        q_nope: View<'_, T, 3>,
        kv_b: &Array<f64>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        round(out, |out| reference::mla_absorb_query(spec, q_nope, kv_b.view(), out))
    }
    fn mla_project_value(
        &mut self,
        spec: &Mla,
        latent: View<'_, T, 3>,
        kv_b: &Array<f64>,
        out: ViewMut<'_, T, 3>,
    ) -> Result<()> {
        round(out, |out| reference::mla_project_value(spec, latent, kv_b.view(), out))
    }
    fn sigmoid_mul(&mut self, x: View<'_, T, 2>, gate: View<'_, T, 2>, out: ViewMut<'_, T, 2>) -> Result<()> {
        round(out, |out| reference::sigmoid_mul(x, gate, out))
    }
    fn add(&mut self, x: View<'_, T, 2>, y: View<'_, T, 2>, multiplier: f64, out: ViewMut<'_, T, 2>) -> Result<()> {
        round(out, |out| reference::add(x, y, multiplier, out))
    }
    fn mlp(&mut self, spec: &Ffn, x: View<'_, T, 2>, weights: &&dyn Block, out: ViewMut<'_, T, 2>) -> Result<()> {
        round(out, |out| self.exact.mlp(spec, widen(x).view(), weights, out))
    }
    fn router_logits(
        &mut self,
        spec: &Router,
        hidden: View<'_, T, 2>,
        weights: &&dyn Mixture,
        logits: ViewMut<'_, f64, 2>,
    ) -> Result<()> {
        self.exact.router_logits(spec, widen(hidden).view(), weights, logits)
    }
    fn route(&mut self, spec: &Router, input: &RouteInput<'_, f64>, output: RouteOutput<'_, f64>) -> Result<()> {
        reference::route(spec, input, output)
    }
    fn expert_ffn(
        &mut self,
        spec: &ExpertFfn,
        hidden: View<'_, T, 2>,
        routing: &Routing<'_, f64>,
        weights: &&dyn Mixture,
        out: ViewMut<'_, T, 2>,
    ) -> Result<()> {
        round(out, |out| self.exact.expert_ffn(spec, widen(hidden).view(), routing, weights, out))
    }
    fn moe(
        &mut self,
        spec: &Moe,
        input: &MoeInput<'_, T, f64>,
        weights: &&dyn Mixture,
        output: MoeOutput<'_, T, f64>,
    ) -> Result<()> {
        let hidden = widen(input.hidden);
        let mut wide = MoeInput::new(hidden.view());
        (wide.routing, wide.token_mask, wide.seed) = (input.routing, input.token_mask, input.seed);
        let MoeOutput { out, route, .. } = output;
        round(out, |out| {
            let mut output = MoeOutput::new(out);
            output.route = route;
            self.exact.moe(spec, &wide, weights, output)
        })
    }
    fn wkv(&mut self, input: &WkvInput<'_, T, f64>, output: WkvOutput<'_, T, f64>) -> Result<()> {
        let WkvOutput { out, state_out, .. } = output;
        round(out, |out| {
            let mut output = WkvOutput::new(out);
            output.state_out = state_out;
            reference::wkv(input, output)
        })
    }
}
