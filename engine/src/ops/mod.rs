//! Operations with their gradients.

pub mod attention;
pub mod conv;
pub mod group_norm;
pub mod index;
pub mod loss;
pub mod matmul;
pub mod modulate;
pub mod norm;
pub mod parts;
pub mod pointwise;
pub mod position;
pub mod reduce;
pub mod resample;
pub mod rope;
pub mod view;

pub use attention::{AttentionBackward, AttentionForward, attention};
pub use conv::{ConvAxis, ConvForward, Padding, conv, patchify, patchify_conv};
pub use group_norm::{ChannelScale, group_norm, group_norm_silu};
pub use index::embedding;
pub use loss::{dropout, mse};
pub use matmul::linear;
pub use modulate::{ModulatedNormBackward, ModulatedNormForward, modulate, modulated_layer_norm};
pub use norm::{NormBackward, NormForward, layer_norm, rms_norm, softmax};
pub use parts::{in_parts, in_place_of};
pub use pointwise::{pointwise, pointwise_to};
pub use position::relative_position_bias;
pub use resample::{repeat_nearest, resize_linear};
pub use rope::{NormRopeBackward, NormRopeForward, RopeLayout, rms_norm_rope, rope};

/// The gradient-check cases of all ops.
pub fn cases() -> impl Iterator<Item = &'static crate::gradcheck::Case> {
    let files = [
        attention::CASES,
        conv::CASES,
        group_norm::CASES,
        index::CASES,
        loss::CASES,
        matmul::CASES,
        modulate::CASES,
        norm::CASES,
        pointwise::CASES,
        position::CASES,
        reduce::CASES,
        resample::CASES,
        rope::CASES,
        view::CASES,
    ];
    files.into_iter().flatten()
}
