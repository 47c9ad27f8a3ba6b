//! Commands: kernels are recorded one after the other and submitted many at once.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::wgpu::{
    BindGroupDescriptor, BindGroupEntry, BindGroupLayout, BindGroupLayoutDescriptor, BindGroupLayoutEntry,
    BindingResource, BindingType, BufferBinding, BufferBindingType, BufferDescriptor, BufferUsages, CommandEncoder,
    CommandEncoderDescriptor, ComputePass, ComputePassDescriptor, ComputePipeline, ComputePipelineDescriptor, Device,
    ErrorFilter, MapMode, PipelineLayoutDescriptor, PollType, Queue, ShaderModuleDescriptor, ShaderSource,
    ShaderStages,
};
use flowtape_engine::pool::{Pool, Pooled};
use flowtape_engine::{DType, Error, Result};

use super::memory::{Block, Memory};
use super::pointwise::Body;
use super::view::{Access, BindingLimits, View};
use super::wgsl;

/// Kernels of a submission.
const KERNELS: usize = 256;
/// Bytes of the parameters of a submission.
const PARAMS: u64 = 256 << 10;

/// What was asked of a device, or what it has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) binding: BindingLimits,
    /// Storage buffers of a kernel.
    pub(super) bindings: usize,
    /// Workgroups along an axis.
    pub(super) workgroups: u32,
    /// Bytes of workgroup memory.
    pub(super) shared: usize,
    /// What the start of a uniform binding is a multiple of.
    pub(super) uniform: u64,
}

impl Bounds {
    pub(super) fn of(limits: &::wgpu::Limits) -> Self {
        Self {
            binding: BindingLimits {
                // Elements are counted in u32.
                size: limits.max_storage_buffer_binding_size.min(1 << 32) / 4 * 4,
                alignment: limits.min_storage_buffer_offset_alignment.into(),
            },
            bindings: limits.max_storage_buffers_per_shader_stage as usize,
            workgroups: limits.max_compute_workgroups_per_dimension,
            shared: limits.max_compute_workgroup_storage_size as usize,
            uniform: limits.min_uniform_buffer_offset_alignment.into(),
        }
    }
}

/// What tells one kernel from another: its name, what its text depends on, and how its operands are bound.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    name: &'static str,
    shape: Vec<u64>,
    operands: Vec<(usize, DType, Access)>,
    written: Vec<(bool, bool)>,
    params: usize,
}

/// A kernel to run.
pub(super) struct Launch<'a> {
    /// Its name in errors and in the cache.
    pub(super) name: &'static str,
    /// What its text depends on, beside the operands' dtypes.
    pub(super) shape: Vec<u64>,
    pub(super) operands: &'a [(&'a View, Access)],
    /// Parameters after the operands' offsets.
    pub(super) params: &'a [u32],
    pub(super) workgroups: usize,
}

#[derive(Debug, Default)]
struct Batch {
    pass: Option<ComputePass<'static>>,
    encoder: Option<CommandEncoder>,
    params: Vec<u8>,
    kernels: usize,
    number: u64,
}

/// What has gone wrong behind our back.
#[derive(Debug, Default)]
struct Health(Mutex<Option<Error>>);

impl Health {
    fn set(&self, error: Error) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Inputs that a kernel's bindings hold.
pub(super) struct Packed {
    pub(super) inputs: Vec<View>,
    _memory: Option<Pooled<Memory>>,
}

/// The first words of a block.
fn words(block: &Arc<Block>, len: usize) -> View {
    View::plain(block, DType::U32, &[len])
}

/// A device, its memory and its commands.
#[derive(Debug)]
pub(super) struct Gpu {
    device: Device,
    queue: Queue,
    pub(super) name: String,
    pub(super) bounds: Bounds,
    pub(super) pool: Pool<Memory>,
    params: ::wgpu::Buffer,
    batch: Mutex<Batch>,
    kernels: Mutex<HashMap<Key, Arc<ComputePipeline>>>,
    layouts: Mutex<HashMap<Vec<bool>, BindGroupLayout>>,
    health: Arc<Health>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(device: &str, what: impl ToString) -> Error {
    Error::DeviceFailed { device: device.into(), what: what.to_string() }
}

impl Gpu {
    pub(super) fn new(device: Device, queue: Queue, name: String, bounds: Bounds) -> Self {
        let health = Arc::new(Health::default());
        let (to, called) = (health.clone(), name.clone());
        device.on_uncaptured_error(Arc::new(move |e: ::wgpu::Error| to.set(failed(&called, e))));
        let (to, called) = (health.clone(), name.clone());
        device.set_device_lost_callback(move |reason, message| {
            if reason != ::wgpu::DeviceLostReason::Destroyed {
                to.set(failed(&called, format!("the device was lost: {message}")));
            }
        });
        let params = device.create_buffer(&BufferDescriptor {
            label: Some("parameters"),
            size: PARAMS,
            usage: BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let pool = super::memory::pool(&device, &name, device.limits().max_buffer_size);
        let batch = Mutex::new(Batch { number: 1, ..Batch::default() });
        let (kernels, layouts) = (Mutex::default(), Mutex::default());
        Self { device, queue, name, bounds, pool, params, batch, kernels, layouts, health }
    }

    /// An error that came up since the device was opened; from then on nothing it computes counts.
    pub(super) fn check(&self) -> Result<()> {
        match &*lock(&self.health.0) {
            Some(error) => Err(failed(&self.name, error)),
            None => Ok(()),
        }
    }

    /// Scratch memory of f32 values.
    pub(super) fn scratch(&self, dims: &[usize]) -> Result<(Pooled<Memory>, View)> {
        let memory = self.pool.alloc(dims.iter().product::<usize>() * 4)?;
        let view = View::plain(memory.block(), DType::F32, dims);
        Ok((memory, view))
    }

    /// Whether one kernel can hold these operands.
    pub(super) fn holds(&self, views: &[&View]) -> bool {
        let mut blocks: Vec<_> = views.iter().map(|v| Arc::as_ptr(&v.block)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.len() <= self.bounds.bindings && views.iter().all(|v| self.bounds.binding.fits(v))
    }

    /// The inputs, some of them copied side by side into one block where they and the outputs are more than a kernel's
    /// bindings.
    pub(super) fn packed(&self, inputs: &[View], outputs: &[View]) -> Result<Packed> {
        let views: Vec<&View> = inputs.iter().chain(outputs).collect();
        let mut out = Packed { inputs: inputs.to_vec(), _memory: None };
        if self.holds(&views) {
            return Ok(out);
        }
        let spans: Vec<usize> = inputs.iter().map(|v| ((v.span().1 - v.span().0) / 4) as usize).collect();
        let movable = |i: &usize| !outputs.iter().any(|o| Arc::ptr_eq(&o.block, &inputs[*i].block));
        let mut order: Vec<usize> = (0..inputs.len()).filter(movable).collect();
        order.sort_by_key(|i| spans[*i]);
        let (memory, block) = self.scratch(&[order.iter().map(|i| spans[*i]).sum()])?;
        let mut start = 0;
        for i in order {
            let (view, len) = (&inputs[i], spans[i]);
            let from = View { offset: (view.span().0 / 4) as usize, ..words(&view.block, len) };
            let to = View { offset: start, ..words(&block.block, len) };
            super::pointwise::run(self, Body::Copy, &[from], &[], &[to])?;
            let per_word = 4 / view.dtype.size();
            let offset = start * per_word + view.offset - (view.span().0 as usize / view.dtype.size());
            out.inputs[i] = View { block: block.block.clone(), offset, ..view.clone() };
            start += len;
            let views: Vec<&View> = out.inputs.iter().chain(outputs).collect();
            if self.holds(&views) {
                break;
            }
        }
        out._memory = Some(memory);
        Ok(out)
    }

    fn layout(&self, written: &[bool]) -> BindGroupLayout {
        let entry = |binding: usize, ty: BufferBindingType| BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let make = || {
            let storage = written.iter().enumerate();
            let storage = storage.map(|(i, w)| entry(i + 1, BufferBindingType::Storage { read_only: !w }));
            let entries: Vec<_> = [entry(0, BufferBindingType::Uniform)].into_iter().chain(storage).collect();
            self.device.create_bind_group_layout(&BindGroupLayoutDescriptor { label: None, entries: &entries })
        };
        lock(&self.layouts).entry(written.to_vec()).or_insert_with(make).clone()
    }

    fn compile(&self, name: &str, source: &str, layout: &BindGroupLayout) -> Result<Arc<ComputePipeline>> {
        let scope = self.device.push_error_scope(ErrorFilter::Validation);
        let module = self.device.create_shader_module(ShaderModuleDescriptor {
            label: Some(name),
            source: ShaderSource::Wgsl(source.into()),
        });
        let layout = self.device.create_pipeline_layout(&PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: ::wgpu::PipelineCompilationOptions {
                // All kernels write their workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        match pollster::block_on(scope.pop()) {
            Some(error) => Err(failed(&self.name, format!("the kernel {name} does not compile: {error}"))),
            None => Ok(Arc::new(pipeline)),
        }
    }

    /// Records a kernel. `body` prints what follows the declarations, where the kernel is not known yet.
    pub(super) fn launch(&self, launch: &Launch<'_>, body: impl FnOnce() -> String) -> Result<()> {
        let Launch { name, shape, operands, params, workgroups } = launch;
        if *workgroups == 0 {
            return Ok(());
        }
        self.check()?;
        let plan = self.bounds.binding.plan(operands);
        let written: Vec<bool> = plan.bindings.iter().map(|b| b.written).collect();
        let layout = self.layout(&written);
        let count = operands.len() + params.len();
        let key = Key {
            name,
            shape: shape.clone(),
            operands: operands.iter().zip(&plan.places).map(|((v, a), p)| (*p, v.dtype, *a)).collect(),
            written: plan.bindings.iter().map(|b| (b.written, b.atomic)).collect(),
            params: count,
        };
        let known = lock(&self.kernels).get(&key).cloned();
        let pipeline = match known {
            Some(pipeline) => pipeline,
            None => {
                let source = wgsl::header(operands, &plan, count) + &body();
                let pipeline = self.compile(name, &source, &layout)?;
                lock(&self.kernels).insert(key, pipeline.clone());
                pipeline
            }
        };
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&plan.offsets).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(params));
        bytes.resize(bytes.len().max(4).next_multiple_of(16), 0);
        let size = bytes.len() as u64;

        let mut batch = lock(&self.batch);
        let start = (batch.params.len() as u64).next_multiple_of(self.bounds.uniform);
        let start = if batch.kernels >= KERNELS || start + size > PARAMS {
            self.submit(&mut batch);
            0
        } else {
            start
        };
        batch.params.resize(start as usize, 0);
        batch.params.extend(bytes);
        plan.bindings.iter().for_each(|b| b.block.use_in(batch.number));
        let window = |buffer, offset, size| {
            BindingResource::Buffer(BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
        };
        let parameters = BindGroupEntry { binding: 0, resource: window(&self.params, start, size) };
        let storage = plan.bindings.iter().enumerate().map(|(i, b)| BindGroupEntry {
            binding: i as u32 + 1,
            resource: window(&b.block.buffer, b.start, b.end - b.start),
        });
        let entries: Vec<_> = [parameters].into_iter().chain(storage).collect();
        let group = self.device.create_bind_group(&BindGroupDescriptor {
            label: Some(name),
            layout: &layout,
            entries: &entries,
        });
        let Batch { pass, encoder, kernels, .. } = &mut *batch;
        let pass = pass.get_or_insert_with(|| {
            let encoder = encoder.get_or_insert_with(|| self.encoder());
            encoder.begin_compute_pass(&ComputePassDescriptor::default()).forget_lifetime()
        });
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        let [x, y, z] = folded(*workgroups, self.bounds.workgroups);
        pass.dispatch_workgroups(x, y, z);
        *kernels += 1;
        Ok(())
    }

    fn encoder(&self) -> CommandEncoder {
        self.device.create_command_encoder(&CommandEncoderDescriptor::default())
    }

    fn submit(&self, batch: &mut Batch) {
        drop(batch.pass.take());
        if let Some(encoder) = batch.encoder.take() {
            if !batch.params.is_empty() {
                batch.params.resize(batch.params.len().next_multiple_of(4), 0);
                self.queue.write_buffer(&self.params, 0, &batch.params);
            }
            self.queue.submit([encoder.finish()]);
        }
        batch.params.clear();
        batch.kernels = 0;
        batch.number += 1;
        // Lets go of memory whose commands are done.
        let _ = self.device.poll(PollType::Poll);
    }

    /// Writes to the start of a block, after all commands so far.
    pub(super) fn upload(&self, block: &Block, bytes: &[u8]) -> Result<()> {
        self.check()?;
        let mut batch = lock(&self.batch);
        if block.used_in(batch.number) {
            self.submit(&mut batch);
        }
        let whole = bytes.len() / 4 * 4;
        if whole > 0 {
            self.queue.write_buffer(&block.buffer, 0, &bytes[..whole]);
        }
        if whole < bytes.len() {
            let mut last = [0; 4];
            last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            self.queue.write_buffer(&block.buffer, whole as u64, &last);
        }
        Ok(())
    }

    /// Reads the start of a block, after all commands so far.
    pub(super) fn download(&self, block: &Block, bytes: usize) -> Result<Vec<u8>> {
        self.check()?;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let size = (bytes as u64).next_multiple_of(4);
        let memory = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let staging = self.device.create_buffer(&BufferDescriptor {
            label: Some("download"),
            size,
            usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        if let Some(error) = pollster::block_on(memory.pop()) {
            return Err(Error::OutOfMemory { device: self.name.clone(), bytes, reason: error.to_string() });
        }
        {
            let mut batch = lock(&self.batch);
            drop(batch.pass.take());
            let encoder = batch.encoder.get_or_insert_with(|| self.encoder());
            encoder.copy_buffer_to_buffer(&block.buffer, 0, &staging, 0, size);
            self.submit(&mut batch);
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(MapMode::Read, .., move |result| drop(sender.send(result)));
        self.wait()?;
        match receiver.try_recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(failed(&self.name, error)),
            Err(error) => return Err(failed(&self.name, error)),
        }
        let values = staging.get_mapped_range(..).map_err(|e| failed(&self.name, e))?;
        Ok(values[..bytes].to_vec())
    }

    fn wait(&self) -> Result<()> {
        self.device.poll(PollType::wait_indefinitely()).map_err(|e| failed(&self.name, e))?;
        self.check()
    }
}

/// `count` workgroups in three dimensions of at most `most`; there may be some more than asked for.
fn folded(count: usize, most: u32) -> [u32; 3] {
    let most = most as usize;
    let x = count.min(most);
    let y = count.div_ceil(x).min(most);
    [x as u32, y as u32, count.div_ceil(x * y) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workgroups_are_folded_below_the_limit() {
        for count in [1, 65_535, 65_536, 1 << 20, (1 << 32) - 1, 65_535 * 65_535 + 1] {
            let [x, y, z] = folded(count, 65_535);
            assert!(x.max(y).max(z) <= 65_535);
            let all = x as usize * y as usize * z as usize;
            assert!(all >= count && all - count < x as usize * y as usize, "{count}: {x} {y} {z}");
        }
    }
}
