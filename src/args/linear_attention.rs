//! Arguments of linear attention: retention and RWKV-4's `wkv`, each with the state that replaces a cache.

use crate::error::{Result, check_len};
use crate::spec::Retention;
use crate::view::{View, ViewMut};

/// One sequence for retention.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct RetentionInput<'a, T, S = f32> {
    /// `[num_tokens, num_heads, head_dim]`
    pub q: View<'a, T, 3>,
    /// `[num_tokens, num_heads, head_dim]`
    pub k: View<'a, T, 3>,
    /// `[num_tokens, num_heads, value_dim]`
    pub v: View<'a, T, 3>,
    /// `[num_heads]`: the factor on the state from one token to the next.
    pub decay: &'a [S],
    /// `[num_heads, head_dim, value_dim]`: the state after the tokens before these. `None`: zero.
    pub state_in: Option<View<'a, S, 3>>,
}

/// What retention writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct RetentionOutput<'a, O, R = f32> {
    /// `[num_tokens, num_heads, value_dim]`
    pub out: ViewMut<'a, O, 3>,
    /// `[num_heads, head_dim, value_dim]`: the state after the last token.
    pub state_out: Option<ViewMut<'a, R, 3>>,
}

impl<'a, O, R> RetentionOutput<'a, O, R> {
    /// Without the state.
    pub const fn new(out: ViewMut<'a, O, 3>) -> Self {
        RetentionOutput { out, state_out: None }
    }

    /// With the state.
    pub const fn with_state(out: ViewMut<'a, O, 3>, state_out: ViewMut<'a, R, 3>) -> Self {
        RetentionOutput { out, state_out: Some(state_out) }
    }
}

impl<'a, T, S> RetentionInput<'a, T, S> {
    /// A sequence from its start.
    pub const fn new(q: View<'a, T, 3>, k: View<'a, T, 3>, v: View<'a, T, 3>, decay: &'a [S]) -> Self {
        RetentionInput { q, k, v, decay, state_in: None }
    }

    /// Validates the specification and every argument; gives the number of tokens.
    ///
    /// # Errors
    /// Those of [`Retention::validate`]; [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`].
    pub fn check<O, R>(&self, spec: &Retention, output: &RetentionOutput<'_, O, R>) -> Result<usize> {
        spec.validate()?;
        let n = self.q.shape()[0];
        let (heads, dim, value_dim) = (spec.num_heads, spec.head_dim, spec.value_dim);
        self.q.check("q", [n, heads, dim])?;
        self.k.check("k", [n, heads, dim])?;
        self.v.check("v", [n, heads, value_dim])?;
        check_len("decay", self.decay.len(), heads)?;
        if let Some(state) = &self.state_in {
            state.check("state_in", [heads, dim, value_dim])?;
        }
        output.out.check("out", [n, heads, value_dim])?;
        if let Some(state) = &output.state_out {
            state.check("state_out", [heads, dim, value_dim])?;
        }
        Ok(n)
    }
}

/// Sequences of equal length for `wkv`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WkvInput<'a, T, S = f32> {
    /// `[batch, seq, channels]`
    pub k: View<'a, T, 3>,
    /// `[batch, seq, channels]`
    pub v: View<'a, T, 3>,
    /// `[channels]`: the state fades by `exp(-exp(decay))` per token.
    pub decay: &'a [S],
    /// `[channels]`: added to the key of the token itself.
    pub first: &'a [S],
    /// `[3, batch, channels]`: numerator, denominator and exponent of the state after the tokens before these. `None`: `(0, 0, -1e38)`.
    pub state_in: Option<View<'a, S, 3>>,
}

/// What `wkv` writes.
#[derive(Debug)]
#[non_exhaustive]
pub struct WkvOutput<'a, O, R = f32> {
    /// `[batch, seq, channels]`
    pub out: ViewMut<'a, O, 3>,
    /// `[3, batch, channels]`: the state after the last token.
    pub state_out: Option<ViewMut<'a, R, 3>>,
}

impl<'a, O, R> WkvOutput<'a, O, R> {
    /// Without the state.
    pub const fn new(out: ViewMut<'a, O, 3>) -> Self {
        WkvOutput { out, state_out: None }
    }

    /// With the state.
    pub const fn with_state(out: ViewMut<'a, O, 3>, state_out: ViewMut<'a, R, 3>) -> Self {
        WkvOutput { out, state_out: Some(state_out) }
    }
}

impl<'a, T, S> WkvInput<'a, T, S> {
    /// Sequences from their start.
    pub const fn new(k: View<'a, T, 3>, v: View<'a, T, 3>, decay: &'a [S], first: &'a [S]) -> Self {
        WkvInput { k, v, decay, first, state_in: None }
    }

    /// Checks every argument; gives batch, sequence length and channels.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::Stride`], [`crate::Error::Len`].
    pub fn check<O, R>(&self, output: &WkvOutput<'_, O, R>) -> Result<[usize; 3]> {
        let shape @ [batch, _, channels] = self.k.shape();
        self.k.check("k", shape)?;
        self.v.check("v", shape)?;
        check_len("decay", self.decay.len(), channels)?;
        check_len("first", self.first.len(), channels)?;
        if let Some(state) = &self.state_in {
            state.check("state_in", [3, batch, channels])?;
        }
        output.out.check("out", shape)?;
        if let Some(state) = &output.state_out {
            state.check("state_out", [3, batch, channels])?;
        }
        Ok(shape)
    }
}
